"""Tokenized documents on disk, memory-mapped so that the ranks of a host share one copy.

    <split>.tokens   uint16 or uint32, ids of all documents, end to end, each bos ... eos
    <split>.offsets  int64 [n + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    <split>.bytes    int64 [n]: UTF-8 bytes of the text of document i

The files are raw arrays; the header of their cache entry has their dtype and sizes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from data.corpus.cache import Job, replace_durably, share_jobs, sync_files, write_durably
from data.corpus.spool import Spool
from data.packing import Int64Array
from data.tokenizer import Tokenizer

PARTS = ("tokens", "offsets", "bytes")  # suffixes of the files of a split
_BATCH_BYTES = 4 << 20  # text encoded at once: enough for all cores, little enough for memory
_PIECE_BYTES = 64 << 20  # text of a file that a process tokenizes on its own
_INDEX_DTYPE = np.dtype("<i8")

TokenArray = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class TokenFile:
    """The documents of one split of one source."""

    tokens: TokenArray  # [num_tokens], memory-mapped
    document_offsets: Int64Array  # [n + 1]
    document_bytes: Int64Array  # [n], UTF-8 bytes of the text
    num_ids: int | None = None  # every id is below; None: not checked
    path: Path | None = None

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

    def span(self, start: int, stop: int) -> TokenArray:
        """Return tokens start .. stop - 1, which belong to one source."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        assert stop <= self._starts[part + 1], "a row lies inside one source"
        first = int(self._starts[part])
        return self.parts[part].span(start - first, stop - first)


Tokens = TokenFile | JoinedTokens


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest dtype that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_token_file(directory: Path, split: str, vocab_size: int) -> TokenFile:
    """Map a split that `write_token_file` wrote."""
    path, offsets, num_bytes = (directory / f"{split}.{part}" for part in PARTS)
    tokens = _map_array(path, token_dtype(vocab_size))
    documents = _map_array(offsets, _INDEX_DTYPE), _map_array(num_bytes, _INDEX_DTYPE)
    return TokenFile(tokens, *documents, vocab_size, path)


def _map_array(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. Slices of a plain array are faster than those of a memmap.
    return (
        np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
    )


class Piece(NamedTuple):
    """Consecutive documents of a split, tokenized into a file: int64 lengths, then the tokens."""

    path: Path
    documents: Int64Array  # numbers in the spool


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
    before = {piece.path for piece in pieces if piece.path.exists()}
    jobs = [
        Job(
            piece.path,
            int(spool.num_bytes(piece.documents).sum()),
            partial(_encode_piece, piece, spool, tokenizer),
        )
        for piece in pieces
    ]
    share_jobs(f"tokenizing {split}", jobs, first)
    new_bytes = sum(
        piece.path.stat().st_size - piece.documents.nbytes
        for piece in pieces
        if piece.path not in before
    )
    return pieces, new_bytes // token_dtype(tokenizer.vocab_size).itemsize


def _split_by_bytes(indices: Int64Array, spool: Spool, num_bytes: int) -> list[Int64Array]:
    numbers = np.cumsum(spool.num_bytes(indices)) // num_bytes
    return np.split(indices, np.flatnonzero(np.diff(numbers)) + 1) if len(indices) else []


def _encode_piece(
    piece: Piece, spool: Spool, tokenizer: Tokenizer, reach: Callable[[int], None]
) -> None:
    dtype, done_bytes = token_dtype(tokenizer.vocab_size), 0
    documents: list[TokenArray] = []
    for batch in _split_by_bytes(piece.documents, spool, _BATCH_BYTES):
        if spool.id_spans is not None:
            documents += [_with_ends(spool.tokens(int(i)), tokenizer, dtype) for i in batch]
        else:
            texts = [spool.document(int(index)) for index in batch]
            documents += encode_documents(texts, tokenizer, dtype)
        done_bytes += int(spool.num_bytes(batch).sum())
        reach(done_bytes)
    lengths = np.array([len(document) for document in documents], _INDEX_DTYPE)
    replace_durably(piece.path, b"".join([lengths.tobytes(), *map(np.ndarray.tobytes, documents)]))


def write_token_file(
    directory: Path, split: str, pieces: Sequence[Piece], document_bytes: Int64Array
) -> None:
    """Join the pieces of a split."""
    num_bytes, lengths = document_bytes.astype(_INDEX_DTYPE), [np.zeros(1, _INDEX_DTYPE)]
    with (directory / f"{split}.tokens").open("wb") as file:
        for piece in pieces:
            content = piece.path.read_bytes()
            lengths.append(np.frombuffer(content, _INDEX_DTYPE, len(piece.documents)).copy())
            file.write(memoryview(content)[lengths[-1].nbytes :])
        sync_files([file])
    write_durably(directory / f"{split}.offsets", np.cumsum(np.concatenate(lengths)).tobytes())
    write_durably(directory / f"{split}.bytes", num_bytes.tobytes())


def encode_documents(
    texts: list[str], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[TokenArray]:
    """Yield the tokens of each text: bos, its ids, eos."""
    for ids in tokenizer.encode_batch(texts):
        # A model file may yield ids beyond its own piece count. Token files are verified by
        # checksum, so the check here covers them too.
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer gives id {ids.max()}, but has {tokenizer.vocab_size} pieces; use "
                "another data.tokenizer"
            )
        yield _with_ends(ids, tokenizer, dtype)


def _with_ends(
    ids: npt.NDArray[np.integer], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]
) -> TokenArray:
    document = np.empty(len(ids) + 2, dtype)
    document[0], document[1:-1], document[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
    return document
