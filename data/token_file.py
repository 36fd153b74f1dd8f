"""Tokenized documents on disk, memory-mapped so that the ranks of a host share one copy.

    <split>.tokens   uint16 or uint32, ids of all documents, end to end, each bos ... eos
    <split>.offsets  int64 [n + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    <split>.bytes    int64 [n]: UTF-8 bytes of the text of document i

The files are raw arrays; the header of their cache entry has their dtype and sizes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from data.corpus.cache import Progress, open_at, replace_durably, sync_files, write_durably
from data.corpus.spool import Spool
from data.packing import Int64Array
from data.tokenizer import Tokenizer

PARTS = ("tokens", "offsets", "bytes")  # suffixes of the files of a split
PROGRESS = "progress.json"  # suffix of the record of what an unfinished split has on disk
_BATCH_BYTES = 4 << 20  # text encoded at once: enough for all cores, little enough for memory
_DURABLE_BYTES = 64 << 20  # text encoded between two flushes to disk
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


def write_token_file(
    directory: Path, split: str, spool: Spool, indices: Int64Array, tokenizer: Tokenizer
) -> int:
    """Encode documents of the spool in the given order; return the number of tokens.

    Continues after the documents that a killed attempt left durably in the directory.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    document_bytes = spool.num_bytes(indices)
    progress_path = directory / f"{split}.{PROGRESS}"
    # The source may have been read again since, with other documents.
    which = xxhash.xxh3_128_hexdigest(spool.hashes[indices].tobytes())
    done = json.loads(progress_path.read_text()) if progress_path.exists() else {}
    num_documents, num_tokens = done.get(which, (0, 0))
    done_bytes = durable_bytes = int(document_bytes[:num_documents].sum())
    with (
        open_at(directory / f"{split}.tokens", num_tokens * dtype.itemsize) as file,
        open_at(directory / f"{split}.offsets", num_documents * _INDEX_DTYPE.itemsize) as offsets,
        Progress(f"tokenizing {split}", int(document_bytes.sum())) as progress,
    ):

        def make_durable() -> None:
            sync_files([file, offsets])
            content = json.dumps({which: [num_documents, num_tokens]})
            replace_durably(progress_path, content.encode())

        progress.reach(done_bytes)
        batch_numbers = np.cumsum(document_bytes[num_documents:]) // _BATCH_BYTES
        starts = np.flatnonzero(np.diff(batch_numbers)) + 1
        for batch in np.split(indices[num_documents:], starts):
            texts = [spool.document(int(index)) for index in batch]
            for document in encode_documents(texts, tokenizer, dtype):
                file.write(document.tobytes())
                offsets.write(num_tokens.to_bytes(_INDEX_DTYPE.itemsize, "little"))
                num_documents += 1
                num_tokens += len(document)
            done_bytes += int(spool.num_bytes(batch).sum())
            progress.reach(done_bytes)
            if done_bytes - durable_bytes >= _DURABLE_BYTES:
                make_durable()
                durable_bytes = done_bytes
        offsets.write(num_tokens.to_bytes(_INDEX_DTYPE.itemsize, "little"))
        make_durable()
    write_durably(directory / f"{split}.bytes", document_bytes.astype(_INDEX_DTYPE).tobytes())
    return num_tokens


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
        document = np.empty(len(ids) + 2, dtype)
        document[0], document[1:-1], document[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
        yield document
