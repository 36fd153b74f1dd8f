"""Decide which documents are held out for evaluation, alike in all sources of a run.

If held-out text is given (`validation_path`), exactly that text is held out. Otherwise the hash of
a document decides, independent of all other documents. Small sources need exceptions; each applies
to the same text in every source, so that no text is in both splits:

1. A source whose documents are all held out keeps the one with the largest hash for training.
2. A source without held-out documents holds out the one with the smallest hash, unless another
   source has no other training document, or it is too large.
3. If still nothing is held out, the end of every document is.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from data.corpus.spool import Spool

DOCUMENT_FILES = ("hashes", "sizes")
TRAINED_ON, HELD_OUT, END_HELD_OUT = range(3)  # the values of a split
_HASH_BUCKETS = 1_000_000  # resolution of data.validation_fraction
# Documents up to this size may be held out even if that exceeds data.validation_fraction.
_SMALL_BYTES = 1 << 20
_CONTINUES = 0b10  # the upper bits of a byte that is not the first of its character

Split = npt.NDArray[np.uint8]  # [n], for each document of a source


class Documents(NamedTuple):
    """The distinct documents of a source, in its order."""

    hashes: npt.NDArray[np.uint64]  # [n], xxh3_64 of the text
    sizes: npt.NDArray[np.int64]  # [n], bytes


def read_documents(folder: Path) -> Documents:
    """Map hashes and sizes; there is at least one document."""
    hashes, sizes = (folder / name for name in DOCUMENT_FILES)
    return Documents(np.memmap(hashes, "<u8", mode="r"), np.memmap(sizes, "<i8", mode="r"))


def split_by_hash(sources: Sequence[Documents], fraction: float) -> list[Split]:
    """Split the documents of all sources, and hold out about `fraction` of them."""
    splits = [
        (hashes % np.uint64(_HASH_BUCKETS) < fraction * _HASH_BUCKETS).astype(np.uint8)
        for hashes, _ in sources
    ]
    if fraction == 0:
        return splits
    for (hashes, _), split in zip(sources, splits, strict=True):
        if (split == HELD_OUT).all():
            _assign(hashes.max(), TRAINED_ON, sources, splits)
    for (hashes, sizes), split in zip(sources, splits, strict=True):
        if not (split == HELD_OUT).any():
            needed = [
                others[np.argmin(of_others)]
                for (others, _), of_others in zip(sources, splits, strict=True)
                if np.count_nonzero(of_others == TRAINED_ON) == 1
            ]
            is_small = sizes <= max(_SMALL_BYTES, fraction * sizes.sum())
            spare = hashes[is_small & ~np.isin(hashes, needed)]
            if len(spare):
                _assign(spare.min(), HELD_OUT, sources, splits)
    if not any((split == HELD_OUT).any() for split in splits):
        splits = [np.full_like(split, END_HELD_OUT) for split in splits]
    return splits


def _assign(
    text: np.uint64, value: int, sources: Sequence[Documents], splits: Sequence[Split]
) -> None:
    """Assign a text to the same split in every source."""
    for (hashes, _), split in zip(sources, splits, strict=True):
        split[hashes == text] = value


class Division(NamedTuple):
    """The texts of a source, and which of them are in which split, by number."""

    spool: Spool
    train: npt.NDArray[np.int64]  # in the order of the source
    validation: npt.NDArray[np.int64]  # in the order of hashes, so that each prefix is a sample
    num_ends: int  # documents whose end is a held-out text


def divide(spool: Spool, split: Split, fraction: float) -> Division:
    """Divide the texts of a source; a held-out end is the last `fraction` of bytes, or more."""
    cut = np.flatnonzero(split == END_HELD_OUT)
    lengths = np.array([_start_of_end(spool.content(i), fraction) for i in cut.tolist()], np.int64)
    cut, lengths = cut[lengths > 0], lengths[lengths > 0]
    heads, ends = spool.spans.copy(), spool.spans[cut]
    heads[cut, 2] = lengths
    ends[:, 1] += lengths
    ends[:, 2] -= lengths
    texts = [spool.content(i)[n:] for i, n in zip(cut.tolist(), lengths.tolist(), strict=True)]
    hashes = np.array([xxhash.xxh3_64_intdigest(text) for text in texts], dtype=np.uint64)
    divided = replace(
        spool,
        spans=np.concatenate([heads, ends]),
        hashes=np.concatenate([spool.hashes, hashes]),
        # Both parts of a document that is cut are tokenized again, so that no token spans the cut.
        id_spans=None if len(cut) else spool.id_spans,
    )
    held_out = np.concatenate([np.flatnonzero(split == HELD_OUT), len(spool) + np.arange(len(cut))])
    train = np.flatnonzero(split != HELD_OUT)
    return Division(divided, train, held_out[np.argsort(divided.hashes[held_out])], len(cut))


def _start_of_end(text: bytes, fraction: float) -> int:
    """Return the byte at which the held-out end of a document begins; 0 if it is too short.

    After a blank line, else after a line, else after a space, if the end is then at most twice as
    long as `fraction` asks for.
    """
    wanted = max(1, round(fraction * len(text)))
    last = len(text) - wanted
    for separator in (b"\n\n", b"\n", b" "):
        found = text.rfind(separator, max(0, last - wanted), last)
        if found >= 0:
            return found + len(separator)
    while last > 0 and text[last] >> 6 == _CONTINUES:
        last -= 1
    return last
