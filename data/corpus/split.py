"""Which documents are held out for evaluation, in all sources of a run alike.

Held-out text that is given (`validation_path`) is held out, and nothing else. Otherwise a document
is held out if the hash of its text says so, whatever else there is. Small sources make exceptions
necessary; each holds for the same text in every source, so that no text is in both splits:

1. A source all of whose documents are held out gets the one with the largest hash back.
2. A source without a held-out document holds out the one with the smallest hash, unless another
   source has nothing else to train on or it is too large to be spared.
3. If nothing is held out then, the end of every document is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from data.corpus.durable import write_durably
from data.corpus.spool import Spool

DOCUMENT_FILES = ("hashes", "sizes")
TRAINED_ON, HELD_OUT, END_HELD_OUT = range(3)  # what a split says of a document
_HASH_BUCKETS = 1_000_000  # resolution of data.validation_fraction
# A document of this size may be held out, though it be more than data.validation_fraction.
_SPARED_BYTES = 1 << 20
_CONTINUES = 0b10  # the upper bits of a byte that is not the first of its character

Split = npt.NDArray[np.uint8]


class Documents(NamedTuple):
    """The distinct documents of a source, in its order."""

    hashes: npt.NDArray[np.uint64]  # [n], xxh3_64 of the text
    sizes: npt.NDArray[np.int64]  # [n], bytes


def write_documents(folder: Path, spool: Spool) -> None:
    """Writes what `read_documents` reads."""
    for name, values in zip(DOCUMENT_FILES, (spool.hashes, spool.sizes), strict=True):
        write_durably(folder / name, values.tobytes())


def read_documents(folder: Path) -> Documents:
    """Reads hashes and sizes; an empty file cannot be mapped, and there is none."""
    hashes, sizes = (folder / name for name in DOCUMENT_FILES)
    return Documents(np.memmap(hashes, "<u8", mode="r"), np.memmap(sizes, "<i8", mode="r"))


def split_by_hash(sources: Sequence[Documents], fraction: float) -> list[Split]:
    """Splits the documents of all sources; `fraction` of them are held out, or of their bytes."""
    splits = [
        (hashes % np.uint64(_HASH_BUCKETS) < fraction * _HASH_BUCKETS).astype(np.uint8)
        for hashes, _ in sources
    ]
    if fraction == 0:
        return splits
    for (hashes, _), split in zip(sources, splits, strict=True):
        if (split == HELD_OUT).all():
            _assign(hashes.max(), TRAINED_ON, sources, splits)
    for source, split in zip(sources, splits, strict=True):
        if not (split == HELD_OUT).any():
            _hold_out_smallest(source, fraction, sources, splits)
    if not any((split == HELD_OUT).any() for split in splits):
        splits = [np.full_like(split, END_HELD_OUT) for split in splits]
    return splits


def _assign(
    text: np.uint64, value: int, sources: Sequence[Documents], splits: Sequence[Split]
) -> None:
    """Says the same of a text in every source."""
    for (hashes, _), split in zip(sources, splits, strict=True):
        split[hashes == text] = value


def _hold_out_smallest(
    source: Documents, fraction: float, sources: Sequence[Documents], splits: Sequence[Split]
) -> None:
    """Holds out the document with the smallest hash, of those that can be spared."""
    needed = [
        other.hashes[np.argmin(split)]
        for other, split in zip(sources, splits, strict=True)
        if len(split) - np.count_nonzero(split) == 1
    ]
    is_small = source.sizes <= max(_SPARED_BYTES, fraction * source.sizes.sum())
    spare = source.hashes[is_small & ~np.isin(source.hashes, needed)]
    if len(spare):
        _assign(spare.min(), HELD_OUT, sources, splits)


def split_by_given(sources: Sequence[Documents], held_out: Sequence[Documents]) -> list[Split]:
    """Splits the documents of sources by whether they are among those given to be held out."""
    given = np.concatenate([hashes for hashes, _ in held_out])
    return [np.isin(hashes, given).astype(np.uint8) for hashes, _ in sources]


class Division(NamedTuple):
    """The texts of a source, and which of them are in which split, by number."""

    spool: Spool
    train: npt.NDArray[np.int64]  # in the order of the source
    # In the order of hashes, in which every first part is a fair sample.
    validation: npt.NDArray[np.int64]
    num_ends: int  # documents whose end is a text of its own


def divide(spool: Spool, split: Split, fraction: float) -> Division:
    """Divides the texts of a source; a held-out end is the last `fraction` of bytes, or more."""
    cut = np.flatnonzero(split == END_HELD_OUT)
    lengths = np.array([_start_of_end(spool, int(i), fraction) for i in cut], dtype=np.int64)
    cut, lengths = cut[lengths > 0], lengths[lengths > 0]
    starts, sizes = spool.starts[cut] + lengths, spool.sizes[cut] - lengths
    ends = [spool.text[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]
    hashes = np.array([xxhash.xxh3_64_intdigest(end) for end in ends], dtype=np.uint64)
    head_sizes = spool.sizes.copy()
    head_sizes[cut] = lengths
    texts = Spool(
        spool.text,
        np.concatenate([spool.starts, starts]),
        np.concatenate([head_sizes, sizes]),
        np.concatenate([spool.hashes, hashes]),
    )
    held_out = np.concatenate([np.flatnonzero(split == HELD_OUT), len(spool) + np.arange(len(cut))])
    train = np.flatnonzero(split != HELD_OUT)
    return Division(texts, train, held_out[np.argsort(texts.hashes[held_out])], len(cut))


def _start_of_end(spool: Spool, index: int, fraction: float) -> int:
    """Where the held-out end of a document begins, in bytes; 0 if it is too short to be cut.

    After a blank line, else after a line, else after a space, as long as the end is no more than
    twice as long as asked for.
    """
    text, start, size = spool.text, int(spool.starts[index]), int(spool.sizes[index])
    wanted = max(1, round(fraction * size))
    last = start + size - wanted
    first = max(start, last - wanted)
    for separator in (b"\n\n", b"\n", b" "):
        found = text.rfind(separator, first, last)
        if found >= 0:
            return found + len(separator) - start
    while last > start and text[last] >> 6 == _CONTINUES:
        last -= 1
    return last - start
