"""Tokens on disk: one flat file of ids, where each document begins, and how many bytes of text it
was.

    <split>.tokens   uint16 or uint32, ids of all documents, end to end, each bos ... eos
    <split>.offsets  int64 [n + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    <split>.bytes    int64 [n]: UTF-8 bytes of the text of document i

Files are raw arrays; their dtype and sizes are in the header of the cache entry that holds them.
The ids are memory-mapped, so ranks of a host share one copy in the page cache and a large corpus
needs no memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from data.corpus.cache import Progress, open_at, replace_durably, sync_files, write_durably
from data.corpus.spool import Spool
from data.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20  # text encoded at once: enough for every core, little enough for memory
_INDEX_DTYPE = np.dtype("<i8")
_DURABLE_BYTES = 64 << 20  # text encoded between two times that its tokens are made durable
PROGRESS = "progress.json"  # suffix of what a split that is being written has durably
PARTS = ("tokens", "offsets", "bytes")  # suffixes of the files of a split


class Tokens(Protocol):
    """Documents of a split as tokens, of one source or of several end to end."""

    @property
    def document_offsets(self) -> npt.NDArray[np.int64]:
        """Where each document begins, and the end of the last: [n + 1]."""

    @property
    def document_bytes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of the text of each document: [n]."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""

    @property
    def num_documents(self) -> int:
        """Documents."""

    @property
    def parts(self) -> "tuple[Tokens, ...]":
        """The tokens of each source."""

    def span(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Returns tokens start .. stop - 1."""


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

        Raises UserError for an id that the tokenizer cannot have given: with the embedding cut
        over ranks it would be looked up nowhere, and trained on as zeros.
        """
        tokens = self.tokens[start:stop]
        if self.num_ids is not None and (beyond := np.flatnonzero(tokens >= self.num_ids)).size:
            place = int(beyond[0])
            folder = self.path.parent if self.path else None
            raise UserError(
                f"token {start + place} of {self.path} is {tokens[place]}, but the tokenizer has "
                f"ids up to {self.num_ids - 1}: the file is damaged; delete {folder}, and it is "
                "made again"
            )
        return tokens

    @property
    def num_tokens(self) -> int:
        """Tokens in this split."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in this split."""
        return len(self.document_bytes)

    @property
    def parts(self) -> "tuple[Tokens, ...]":
        """The token files of each source: this one."""
        return (self,)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest dtype on disk that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_token_file(directory: Path, split: str, vocab_size: int) -> TokenFile:
    """Maps a split that `write_token_file` wrote."""
    path = directory / f"{split}.tokens"
    dtype = token_dtype(vocab_size)
    return TokenFile(
        _mapped(path, dtype),
        _mapped(directory / f"{split}.offsets", _INDEX_DTYPE),
        _mapped(directory / f"{split}.bytes", _INDEX_DTYPE),
        vocab_size,
        path,
    )


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. As a plain array: slices of a memmap are slow to make.
    return (
        np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
    )


def write_token_file(
    directory: Path,
    split: str,
    spool: Spool,
    indices: npt.NDArray[np.int64],
    tokenizer: Tokenizer,
) -> int:
    """Encodes documents of the spool, in the order given; returns the number of tokens written.

    What an attempt that was killed has made durable in the directory is not encoded again.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    document_bytes = spool.num_bytes(indices)
    progress_path = directory / f"{split}.{PROGRESS}"
    # A source may have been read anew meanwhile, and not every one gives the same again.
    which = xxhash.xxh3_128_hexdigest(spool.hashes[indices].tobytes())
    done = json.loads(progress_path.read_text()) if progress_path.exists() else {}
    num_documents, num_tokens = done.get(which, (0, 0))
    done_bytes = durable_bytes = int(document_bytes[:num_documents].sum())
    with (
        open_at(directory / f"{split}.tokens", num_tokens * dtype.itemsize) as file,
        # Offsets begin with that of the first document, 0.
        open_at(directory / f"{split}.offsets", num_documents * _INDEX_DTYPE.itemsize) as offsets,
        Progress(f"tokenizing {split}", int(document_bytes.sum())) as progress,
    ):
        progress.reach(done_bytes)

        def make_durable() -> None:
            sync_files([file, offsets])
            content = json.dumps({which: [num_documents, num_tokens]})
            replace_durably(progress_path, content.encode())

        for batch in _batches(indices[num_documents:], document_bytes[num_documents:]):
            texts = [spool.document(int(index)) for index in batch]
            for document in encoded(texts, tokenizer, dtype):
                file.write(document.tobytes())
                offsets.write(num_tokens.to_bytes(_INDEX_DTYPE.itemsize, "little"))
                num_documents += 1
                num_tokens += len(document)
            batch_bytes = int(spool.num_bytes(batch).sum())
            done_bytes += batch_bytes
            progress.reach(done_bytes)
            if done_bytes - durable_bytes >= _DURABLE_BYTES:
                make_durable()
                durable_bytes = done_bytes
        offsets.write(num_tokens.to_bytes(_INDEX_DTYPE.itemsize, "little"))
        make_durable()
    write_durably(directory / f"{split}.bytes", document_bytes.astype(_INDEX_DTYPE).tobytes())
    return num_tokens


def encoded(
    texts: list[str], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]
) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """The tokens of documents: bos, those of the text, eos."""
    for ids in tokenizer.encode_batch(texts):
        # A model file may give ids that its own piece count does not cover. A token file whose
        # checksum is right has been through here, so its ids need not be looked at again.
        if ids.size and int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer gives id {ids.max()}, but has {tokenizer.vocab_size} pieces; use "
                "another data.tokenizer"
            )
        document = np.empty(len(ids) + 2, dtype)
        document[0], document[1:-1], document[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
        yield document


def _batches(
    indices: npt.NDArray[np.int64], document_bytes: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Yields runs of documents of about `_BATCH_BYTES` of text; at least one document each."""
    run = np.cumsum(document_bytes) // _BATCH_BYTES
    boundaries = np.flatnonzero(np.diff(run)) + 1
    yield from (batch for batch in np.split(indices, boundaries) if len(batch))
