"""Which keys the queries of a rank see: a few contiguous runs of positions, never a mask `[s, s]`.

Attention is causal, and with inter-document masking it stays inside documents, which are contiguous
in a row. A context-parallel rank has its positions of a row in order, so its part of a document is
contiguous too. Of the keys of one rank, the queries of a document therefore see one run: all of it
if the keys are another rank's, causally if they are its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# For each row, the columns where its documents, and the padding at its end, begin; the first is 0.
Documents = Sequence[Sequence[int]]


class Segment(NamedTuple):
    """The queries of one document and the keys they see; `rows` are neighbours that share both."""

    rows: slice
    queries: slice
    keys: slice


class PackedSequences(NamedTuple):
    """Positions of sequences of different lengths, concatenated."""

    indices: Tensor  # [n] int64, of the positions in `[s, b]` flattened
    offsets: Tensor  # [sequences + 1] int32, of the first position of each sequence, and n
    max_length: int


@dataclass(frozen=True)
class Segments:
    """All segments of some queries and keys; a query outside them sees no key."""

    parts: tuple[Segment, ...]  # by row, then by query
    # One sequence per segment and row, for variable-length kernels.
    queries: PackedSequences
    keys: PackedSequences

    def map(self, function: Callable[[Tensor], Tensor]) -> "Segments":
        """Apply a function to the tensors."""
        queries, keys = (
            PackedSequences(function(packed.indices), function(packed.offsets), packed.max_length)
            for packed in (self.queries, self.keys)
        )
        return Segments(self.parts, queries, keys)


class KeyBlock(NamedTuple):
    """The keys of one context-parallel rank that this rank's queries see."""

    queries: slice  # of this rank's positions
    keys: slice  # of the other's
    segments: Segments | None  # of these queries and keys; None: one, of all
    is_causal: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> "KeyBlock":
        """Apply a function to the tensors."""
        return self._replace(segments=self.segments and self.segments.map(function))


KeyBlocks = dict[int, KeyBlock]  # by cp rank; those without visible keys are missing


def make_key_blocks(
    width: int, documents: Documents | None = None, cp_rank: int = 0, cp_size: int = 1
) -> KeyBlocks:
    """The blocks of rows of `width` positions; without documents, queries see all earlier keys.

    Rank r has chunks r and 2c - 1 - r of 2c (ops/balance.py). Of another rank, its queries see
    chunk o if o < r, and otherwise both chunks, but only from chunk 2c - 1 - r.
    """
    if documents is not None and all(len(begins) == 1 for begins in documents):
        documents = None
    size, blocks = -(-width // (2 * cp_size)), {}
    chunks = [(rank, 2 * cp_size - 1 - rank) for rank in range(cp_size)]
    for rank in range(cp_size):
        first, end, segments = int(rank > cp_rank), 2 - int(rank < cp_rank), None
        if documents is not None:
            mine, theirs = chunks[cp_rank][first:], chunks[rank][:end]
            segments = _make_segments(width, documents, size, mine, theirs)
            if segments is None:
                continue
        queries, keys = slice(first * size, None), slice(end * size)
        blocks[rank] = KeyBlock(queries, keys, segments, is_causal=rank == cp_rank)
    return blocks


def _make_segments(
    width: int, documents: Documents, size: int, mine: tuple[int, ...], theirs: tuple[int, ...]
) -> Segments | None:
    """The segments of the queries in my chunks and the keys in theirs; None: there are none."""
    parts = []
    for begins, group in groupby(range(len(documents)), key=documents.__getitem__):
        first, *others = group
        rows = slice(first, first + 1 + len(others))
        ends = [
            [_num_before(column, chunks, size) for column in (*begins, width)]
            for chunks in (mine, theirs)
        ]
        for queries, keys in zip(*map(pairwise, ends), strict=True):
            if queries[0] < queries[1] and keys[0] < keys[1]:
                parts.append(Segment(rows, slice(*queries), slice(*keys)))
    if not parts:
        return None
    b = len(documents)
    packed = [
        _pack([(row, part[of]) for part in parts for row in range(b)[part.rows]], b)
        for of in (1, 2)
    ]
    return Segments(tuple(parts), *packed)


def _num_before(column: int, chunks: tuple[int, ...], size: int) -> int:
    """Count the positions in some chunks of a size that are before a column."""
    return sum(min(max(column - chunk * size, 0), size) for chunk in chunks)


def _pack(runs: list[tuple[int, slice]], num_rows: int) -> PackedSequences:
    """The positions of runs, each of a row."""
    lengths = [run.stop - run.start for _, run in runs]
    indices = [torch.arange(run.start, run.stop) * num_rows + row for row, run in runs]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return PackedSequences(torch.cat(indices), offsets, max(lengths))
