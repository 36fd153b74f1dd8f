"""Documents to tokens: in memory, and in pieces that several processes tokenize together.

[Note: pieces]
A piece is consecutive documents of a split, about 64 MiB of their text. A process tokenizes one at
a time into a file of its own; the pieces are then joined to the files of data/token_file.py.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from data.cache import replace_durably, sync_files, write_durably
from data.corpus.entries import share_jobs
from data.corpus.segments import chat_prompt, target_bytes
from data.corpus.spool import Spool
from data.packing import Int64Array
from data.token_file import INDEX_DTYPE, PARTS, TARGETS, TokenArray, token_dtype
from data.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20  # text encoded at once: enough for all cores, little enough for memory
_PIECE_BYTES = 64 << 20  # text of a file that a process tokenizes on its own
_NO_IDS = np.empty(0, dtype=np.int32)


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
    lengths = np.array([*map(len, tokens)], INDEX_DTYPE)
    if spool.has_segments:
        starts = np.cumsum(lengths) - lengths
        shifted = [own + start for own, start in zip(bounds, starts, strict=True)]
        targets = np.concatenate([np.array(target_sizes, INDEX_DTYPE), *shifted])
        replace_durably(piece.targets_path, targets.tobytes())
    replace_durably(piece.path, b"".join([lengths.tobytes(), *map(np.ndarray.tobytes, tokens)]))


def write_token_file(
    directory: Path, split: str, pieces: Sequence[Piece], spool: Spool, indices: Int64Array
) -> None:
    """Join the pieces of a split, which consist of these documents of the spool."""
    lengths, target_sizes, bounds = ([np.zeros(n, INDEX_DTYPE)] for n in (1, 0, 0))
    num_tokens = 0
    with (directory / f"{split}.tokens").open("wb") as file:
        for piece in pieces:
            content = piece.path.read_bytes()
            lengths.append(np.frombuffer(content, INDEX_DTYPE, len(piece.documents)).copy())
            file.write(memoryview(content)[lengths[-1].nbytes :])
            if spool.has_segments:
                targets = np.fromfile(piece.targets_path, INDEX_DTYPE)
                target_sizes.append(targets[: len(piece.documents)])
                bounds.append(targets[len(piece.documents) :] + num_tokens)
            num_tokens += int(lengths[-1].sum())
        sync_files([file])
    parts = [np.cumsum(np.concatenate(lengths)), spool.sizes[indices]]
    if spool.has_segments:
        parts[1:] = [np.concatenate(target_sizes), np.concatenate(bounds)]
    for part, values in zip((*PARTS[1:], TARGETS), parts, strict=False):
        write_durably(directory / f"{split}.{part}", values.astype(INDEX_DTYPE).tobytes())


def encode_segments(
    documents: list[list[str]], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[tuple[TokenArray, Int64Array]]:
    """Yield the tokens of each document, and where its targets begin and end in turn.

    A document is contexts and targets in turn, see data/corpus/segments.py. Its tokens are bos, the
    ids of each segment, and eos after each target.
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
