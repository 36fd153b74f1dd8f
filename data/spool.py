"""The distinct documents of a source as one file of UTF-8 text, and their division into splits.

A source is read once, whatever it is; tokenizer training and encoding then read from here by memory
map, in any order and with little memory. The spool is temporary: it takes as much disk as the text.
"""

import mmap
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

_HASH_BUCKETS = 1_000_000  # resolution of data.validation_fraction
# Characters. Longer lines are cut: sentencepiece would drop those of more than 4192 bytes.
_SENTENCE_LENGTH = 1_000


@dataclass(frozen=True)
class Spool:
    """Documents by number, in source order."""

    text: mmap.mmap | bytes  # all documents, end to end
    offsets: npt.NDArray[np.int64]  # [n + 1], bytes
    hashes: npt.NDArray[np.uint64]  # [n], xxh3_64 of the UTF-8 text; all different

    def __len__(self) -> int:
        return len(self.hashes)

    def document(self, index: int) -> str:
        """Returns the text of one document."""
        return self.text[self.offsets[index] : self.offsets[index + 1]].decode()

    def num_bytes(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the UTF-8 bytes of each of the documents."""
        return self.offsets[indices + 1] - self.offsets[indices]


def spool_documents(documents: Iterable[str], path: Path, skipped: Counter[str]) -> Spool:
    """Writes the documents to `path` without duplicates, which are counted in `skipped`."""
    hashes: dict[int, None] = {}  # a set that keeps the order
    offsets = array("q", [0])
    with path.open("wb") as file:
        for document in documents:
            content = document.encode()
            content_hash = xxhash.xxh3_64_intdigest(content)
            if content_hash in hashes:
                skipped["duplicate"] += 1
                continue
            hashes[content_hash] = None
            file.write(content)
            offsets.append(offsets[-1] + len(content))
    text: mmap.mmap | bytes = b""
    if hashes:  # an empty file cannot be mapped
        with path.open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Spool(
        text,
        np.array(offsets, dtype=np.int64),
        np.fromiter(hashes, dtype=np.uint64, count=len(hashes)),
    )


def split_documents(
    hashes: npt.NDArray[np.uint64], validation_fraction: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Divides documents by their content: (train in source order, validation in order of hash).

    A document stays in its split whatever else the source holds, except that two documents or more
    leave neither split empty: the smallest hash goes to validation, the largest to training. A
    single document is for training. The order of hashes makes every first part of the validation
    documents a fair sample.
    """
    num_documents = len(hashes)
    held_out = hashes % np.uint64(_HASH_BUCKETS) < validation_fraction * _HASH_BUCKETS
    if validation_fraction == 0 or num_documents == 1:
        held_out[:] = False
    elif num_documents > 1:
        held_out[np.argmin(hashes)] |= not held_out.any()
        held_out[np.argmax(hashes)] &= not held_out.all()
    validation = np.flatnonzero(held_out)
    return np.flatnonzero(~held_out), validation[np.argsort(hashes[validation])]


def sample_sentences(spool: Spool, indices: npt.NDArray[np.int64], max_bytes: int) -> Iterator[str]:
    """Yields evenly spread lines of the documents, about `max_bytes` of them or all if there are
    fewer.

    Leading spaces are kept, so that indentation becomes pieces; newlines are not part of any line.
    """
    total_bytes = max(1, int(spool.num_bytes(indices).sum()))
    number = 0
    for index in indices:
        for line in spool.document(int(index)).split("\n"):
            for start in range(0, len(line), _SENTENCE_LENGTH):
                # Picks max_bytes out of every total_bytes sentences, at even distances.
                if number * max_bytes % total_bytes < max_bytes:
                    yield line[start : start + _SENTENCE_LENGTH]
                number += 1


def remove_spool(spool: Spool, path: Path) -> None:
    """Closes and deletes the spool."""
    if isinstance(spool.text, mmap.mmap):
        spool.text.close()
    os.unlink(path)
