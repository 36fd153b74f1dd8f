"""Tokens on disk: one flat file of ids, where each document begins, and how many bytes of text it
was.

    <split>.tokens   ids of all documents, end to end, each bos ... eos; little-endian uint16 or
    uint32 <split>.offsets  int64 [n + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    <split>.bytes    int64 [n]: UTF-8 bytes of the text of document i

Files are raw arrays; their dtype and sizes are in the header of the cache entry that holds them.
The ids are memory-mapped, so ranks of a host share one copy in the page cache and a large corpus
needs no memory.
"""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.progress import Progress
from data.spool import Spool
from data.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20  # text encoded at once: enough for every core, little enough for memory
_INDEX_DTYPE = np.dtype("<i8")
PARTS = ("tokens", "offsets", "bytes")  # suffixes of the files of a split


@dataclass(frozen=True)
class TokenFile:
    """The documents of one split."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]  # [total], memory-mapped
    document_offsets: npt.NDArray[np.int64]  # [n + 1]
    document_bytes: npt.NDArray[np.int64]  # [n], UTF-8 bytes of the text
    num_ids: int | None = None  # every id is below; None: not checked
    path: Path | None = None

    def span(self, start: int, stop: int) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
        """Returns the tokens of a span.

        Raises ValueError for an id that the tokenizer cannot have given: with the embedding cut
        over ranks it would be looked up nowhere, and trained on as zeros.
        """
        tokens = self.tokens[start:stop]
        if self.num_ids is not None and (beyond := np.flatnonzero(tokens >= self.num_ids)).size:
            place = int(beyond[0])
            folder = self.path.parent if self.path else None
            raise ValueError(
                f"token {start + place} of {self.path} is {tokens[place]}, but the tokenizer has "
                f"ids up to {self.num_ids - 1}: the file is damaged; delete {folder}, and it is "
                "made again"
            )
        return tokens

    @property
    def num_documents(self) -> int:
        """Documents in this split."""
        return len(self.document_bytes)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest dtype on disk that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_token_file(directory: Path, split: str, vocab_size: int) -> TokenFile:
    """Maps a split that `write_token_file` wrote."""
    path = directory / f"{split}.tokens"
    dtype = token_dtype(vocab_size)
    # An empty file cannot be mapped.
    mapped = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
    return TokenFile(
        mapped,
        np.fromfile(directory / f"{split}.offsets", _INDEX_DTYPE),
        np.fromfile(directory / f"{split}.bytes", _INDEX_DTYPE),
        vocab_size,
        path,
    )


def write_token_file(
    directory: Path,
    split: str,
    spool: Spool,
    indices: npt.NDArray[np.int64],
    tokenizer: Tokenizer,
) -> int:
    """Encodes documents of the spool, in the order given; returns the number of tokens written."""
    dtype = token_dtype(tokenizer.vocab_size)
    document_bytes = spool.num_bytes(indices)
    offsets = array("q", [0])
    with (
        (directory / f"{split}.tokens").open("wb") as file,
        Progress(f"tokenizing {split}", int(document_bytes.sum())) as progress,
    ):
        for batch in _batches(indices, document_bytes):
            texts = [spool.document(int(index)) for index in batch]
            for ids in tokenizer.encode_batch(texts):
                # A model file may give ids that its own piece count does not cover; caught here, it
                # is not an index error inside the embedding.
                assert not ids.size or int(ids.max()) < tokenizer.vocab_size, (
                    "token id out of range"
                )
                document = np.empty(len(ids) + 2, dtype)
                document[0], document[1:-1], document[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
                file.write(document.tobytes())
                offsets.append(offsets[-1] + len(document))
            progress.advance(int(spool.num_bytes(batch).sum()))
        file.flush()
        os.fsync(file.fileno())
    write_durably(directory / f"{split}.offsets", np.array(offsets, dtype=_INDEX_DTYPE).tobytes())
    write_durably(directory / f"{split}.bytes", document_bytes.astype(_INDEX_DTYPE).tobytes())
    return offsets[-1]


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _batches(
    indices: npt.NDArray[np.int64], document_bytes: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Yields runs of documents of about `_BATCH_BYTES` of text; at least one document each."""
    run = np.cumsum(document_bytes) // _BATCH_BYTES
    boundaries = np.flatnonzero(np.diff(run)) + 1
    yield from (batch for batch in np.split(indices, boundaries) if len(batch))
