"""Tokenized documents on disk, memory-mapped so that the ranks of a host share one copy.

    <split>.tokens   uint16 or uint32, ids of all documents, end to end, each bos ... eos
    <split>.offsets  int64 [n + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    <split>.bytes    int64 [n]: UTF-8 bytes of the text of document i
    <split>.targets  int64 [2 m]: where targets begin and end in turn; only of pairs and
                     conversations (data/segments.py), and .bytes is then that of targets

The files are raw arrays; the header of their cache entry has their dtype and sizes.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from data.corpus.cache import replace_durably, share_jobs, sync_files, write_durably
from data.corpus.spool import Spool
from data.packing import Int64Array
from data.segments import chat_prompt, target_bytes
from data.tokenizer import Tokenizer

PARTS = ("tokens", "offsets", "bytes")  # suffixes of the files of a split
TARGETS = "targets"  # suffix of a further file, if only some tokens are targets
_BATCH_BYTES = 4 << 20  # text encoded at once: enough for all cores, little enough for memory
_PIECE_BYTES = 64 << 20  # text of a file that a process tokenizes on its own
_INDEX_DTYPE = np.dtype("<i8")
_NO_IDS = np.empty(0, dtype=np.int32)

TokenArray = npt.NDArray[np.unsignedinteger]


class Targets:
    """Which tokens of a stream are targets: those from each even bound to the next odd one."""

    def __init__(self, bounds: Int64Array) -> None:
        self.bounds = bounds  # [2 m], ascending
        self._sums = np.concatenate([[0], np.cumsum(bounds[1::2] - bounds[::2])])

    @property
    def num_targets(self) -> int:
        """Targets of the whole stream."""
        return int(self._sums[-1])

    def contains(self, places: Int64Array) -> npt.NDArray[np.bool_]:
        """Return whether each place in the stream has a target."""
        return np.searchsorted(self.bounds, places, side="right") % 2 == 1

    def count(self, starts: Int64Array, stops: Int64Array) -> Int64Array:
        """Return the number of targets from each start up to its stop, without reading tokens."""
        return self._before(stops) - self._before(starts)

    def _before(self, places: Int64Array) -> Int64Array:
        number = np.searchsorted(self.bounds, places, side="right")  # of bounds up to the place
        inside = number % 2 == 1
        found: Int64Array = self._sums[number // 2]
        found[inside] += places[inside] - self.bounds[number[inside] - 1]
        return found


@dataclass(frozen=True)
class TokenFile:
    """The documents of one split of one source."""

    tokens: TokenArray  # [num_tokens], memory-mapped
    document_offsets: Int64Array  # [n + 1]
    document_bytes: Int64Array  # [n], UTF-8 bytes of the text
    num_ids: int | None = None  # every id is below; None: not checked
    path: Path | None = None
    targets: Targets | None = None  # None: all tokens but bos

    def span(self, start: int, stop: int) -> TokenArray:
        """Return tokens start .. stop - 1. Raise UserError for an id beyond the tokenizer's.

        No tensor-parallel rank would find its embedding, so it would train as zeros.
        """
        tokens = self.tokens[start:stop]
        if self.num_ids is not None and (beyond := np.flatnonzero(tokens >= self.num_ids)).size:
            place = int(beyond[0])
            raise UserError(
                f"token {start + place} of {self.path} is {tokens[place]}, but the tokenizer has "
                f"ids up to {self.num_ids - 1}: the file is damaged; delete "
                f"{self.path and self.path.parent} to build it again"
            )
        return tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in this file."""
        return len(self.document_bytes)

    @property
    def parts(self) -> "tuple[TokenFile, ...]":
        """The token file of each source: this one."""
        return (self,)


class JoinedTokens:
    """The token files of one split of all sources, end to end."""

    def __init__(self, parts: Sequence[TokenFile]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.num_tokens for part in parts)])
        self.num_tokens = int(self._starts[-1])
        offsets = [p.document_offsets[:-1] + n for p, n in zip(parts, self._starts, strict=False)]
        self.document_offsets: Int64Array = np.concatenate([*offsets, self._starts[-1:]])
        self.document_bytes: Int64Array = np.concatenate([part.document_bytes for part in parts])
        self.num_documents = len(self.document_bytes)
        self.targets = None
        if any(part.targets is not None for part in parts):
            bounds = [target_bounds(p) + n for p, n in zip(parts, self._starts, strict=False)]
            self.targets = Targets(np.concatenate(bounds))

    def span(self, start: int, stop: int) -> TokenArray:
        """Return tokens start .. stop - 1, which belong to one source."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        assert stop <= self._starts[part + 1], "a row lies inside one source"
        first = int(self._starts[part])
        return self.parts[part].span(start - first, stop - first)


Tokens = TokenFile | JoinedTokens


def target_bounds(file: TokenFile) -> Int64Array:
    """Return where targets begin and end in turn; in a text they are all tokens but bos."""
    if file.targets is not None:
        return file.targets.bounds
    offsets = file.document_offsets
    return np.stack([np.minimum(offsets[:-1] + 1, offsets[1:]), offsets[1:]], axis=1).ravel()


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest dtype that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_token_file(directory: Path, split: str, vocab_size: int) -> TokenFile:
    """Map a split that `write_token_file` wrote."""
    path, offsets, num_bytes = (directory / f"{split}.{part}" for part in PARTS)
    tokens = _map_array(path, token_dtype(vocab_size))
    documents = _map_array(offsets, _INDEX_DTYPE), _map_array(num_bytes, _INDEX_DTYPE)
    bounds = directory / f"{split}.{TARGETS}"
    targets = Targets(_map_array(bounds, _INDEX_DTYPE)) if bounds.exists() else None
    return TokenFile(tokens, *documents, vocab_size, path, targets)


def _map_array(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. Slices of a plain array are faster than those of a memmap.
    return (
        np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
    )


class Piece(NamedTuple):
    """Consecutive documents of a split, tokenized into a file: int64 lengths, then the tokens.

    Of documents with segments, `path`.targets has the bytes of each one's targets, then the bounds
    of targets in the tokens of the piece; all are int64.
    """

    path: Path
    documents: Int64Array  # numbers in the spool

    @property
    def targets_path(self) -> Path:
        """The file of targets, which is complete when `path` exists."""
        return self.path.with_suffix(f".{TARGETS}")


def encode_pieces(
    folder: Path, split: str, spool: Spool, indices: Int64Array, tokenizer: Tokenizer, first: float
) -> tuple[list[Piece], int]:
    """Tokenize documents of the spool, together with other processes.

    Return the pieces, in the given order, and the number of tokens that were not there before.
    `first`: see share_jobs.
    """
    pieces = []
    for documents in _split_by_bytes(indices, spool, _PIECE_BYTES):
        # Equal if and only if the tokens are: the source may have been read again since.
        digest = xxhash.xxh3_128(tokenizer.fingerprint.encode())
        for facts in (spool.hashes[documents], spool.sizes[documents], spool.id_spans is None):
            digest.update(np.asarray(facts).tobytes())
        pieces.append(Piece(folder / f"{split}-{digest.hexdigest()}", documents))
    by_path = {piece.path: piece for piece in pieces}
    new = [piece for path, piece in by_path.items() if not path.exists()]
    sizes = {path: int(spool.sizes[piece.documents].sum()) for path, piece in by_path.items()}
    for path, reach in share_jobs(f"tokenizing {split}", sizes, first):
        _encode_piece(by_path[path], spool, tokenizer, reach)
    new_bytes = sum(piece.path.stat().st_size - piece.documents.nbytes for piece in new)
    return pieces, new_bytes // token_dtype(tokenizer.vocab_size).itemsize


def _split_by_bytes(indices: Int64Array, spool: Spool, num_bytes: int) -> list[Int64Array]:
    numbers = np.cumsum(spool.sizes[indices]) // num_bytes
    return np.split(indices, np.flatnonzero(np.diff(numbers)) + 1) if len(indices) else []


def _encode_piece(
    piece: Piece, spool: Spool, tokenizer: Tokenizer, reach: Callable[[int], None]
) -> None:
    dtype, done_bytes = token_dtype(tokenizer.vocab_size), 0
    encoded: list[tuple[TokenArray, Int64Array]] = []
    target_sizes: list[int] = []
    for batch in _split_by_bytes(piece.documents, spool, _BATCH_BYTES):
        if spool.id_spans is not None:
            ids = (spool.tokens(int(index)) for index in batch)
            encoded += [_join_segments([_NO_IDS, part], tokenizer, dtype) for part in ids]
        else:
            documents = [spool.segments(int(index)) for index in batch]
            encoded += encode_segments(documents, tokenizer, dtype)
            target_sizes += map(target_bytes, documents) if spool.has_segments else ()
        done_bytes += int(spool.sizes[batch].sum())
        reach(done_bytes)
    tokens, bounds = zip(*encoded, strict=True)
    lengths = np.array([*map(len, tokens)], _INDEX_DTYPE)
    if spool.has_segments:
        starts = np.cumsum(lengths) - lengths
        shifted = [own + start for own, start in zip(bounds, starts, strict=True)]
        targets = np.concatenate([np.array(target_sizes, _INDEX_DTYPE), *shifted])
        replace_durably(piece.targets_path, targets.tobytes())
    replace_durably(piece.path, b"".join([lengths.tobytes(), *map(np.ndarray.tobytes, tokens)]))


def write_token_file(
    directory: Path, split: str, pieces: Sequence[Piece], spool: Spool, indices: Int64Array
) -> None:
    """Join the pieces of a split, which consist of these documents of the spool."""
    lengths, target_sizes, bounds = ([np.zeros(n, _INDEX_DTYPE)] for n in (1, 0, 0))
    num_tokens = 0
    with (directory / f"{split}.tokens").open("wb") as file:
        for piece in pieces:
            content = piece.path.read_bytes()
            lengths.append(np.frombuffer(content, _INDEX_DTYPE, len(piece.documents)).copy())
            file.write(memoryview(content)[lengths[-1].nbytes :])
            if spool.has_segments:
                targets = np.fromfile(piece.targets_path, _INDEX_DTYPE)
                target_sizes.append(targets[: len(piece.documents)])
                bounds.append(targets[len(piece.documents) :] + num_tokens)
            num_tokens += int(lengths[-1].sum())
        sync_files([file])
    parts = [np.cumsum(np.concatenate(lengths)), spool.sizes[indices]]
    if spool.has_segments:
        parts[1:] = [np.concatenate(target_sizes), np.concatenate(bounds)]
    for part, values in zip((*PARTS[1:], TARGETS), parts, strict=False):
        write_durably(directory / f"{split}.{part}", values.astype(_INDEX_DTYPE).tobytes())


def encode_segments(
    documents: list[list[str]], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[TokenArray, Int64Array]]:
    """Yield the tokens of each document, and where its targets begin and end in turn.

    A document is contexts and targets in turn, see data/segments.py. Its tokens are bos, the ids of
    each segment, and eos after each target.
    """
    texts = [text for segments in documents for text in segments if text]
    encoded = tokenizer.encode_batch(texts)
    for ids in encoded:
        # A model file may yield ids beyond its own piece count. Token files are verified by
        # checksum, so the check here covers them too.
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer gives id {ids.max()}, but has {tokenizer.vocab_size} pieces; use "
                "another data.tokenizer"
            )
    rest = iter(encoded)
    for segments in documents:
        ids_of_segments = [next(rest) if text else _NO_IDS for text in segments]
        yield _join_segments(ids_of_segments, tokenizer, dtype)


def _join_segments(
    ids: Sequence[npt.NDArray[np.integer]],
    tokenizer: Tokenizer,
    dtype: np.dtype[np.unsignedinteger],
) -> tuple[TokenArray, Int64Array]:
    lengths = [len(part) + number % 2 for number, part in enumerate(ids)]
    ends = [*itertools.accumulate(lengths, initial=1)]  # of bos, context, target, context, ...
    document = np.full(ends[-1], tokenizer.eos_id, dtype)
    document[0] = tokenizer.bos_id
    for start, part in zip(ends, ids, strict=False):
        document[start : start + len(part)] = part
    num_bounds = len(ids) // 2 * 2
    return document, np.array(ends[1 : 1 + num_bounds], dtype=np.int64)


def encode_chat(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a conversation that the assistant is to continue."""
    dtype = token_dtype(tokenizer.vocab_size)
    ((tokens, _),) = encode_segments([chat_prompt(messages)], tokenizer, dtype)
    return [int(token) for token in tokens]


def is_lossy(
    tokens: TokenArray, bounds: Int64Array, segments: list[str], tokenizer: Tokenizer
) -> bool:
    """Whether the tokens of a document decode to other segments."""
    parts = np.split(tokens[1:], bounds - 1)  # eos has no text
    return any(
        tokenizer.decode(part.tolist()) != text for part, text in zip(parts, segments, strict=False)
    )
