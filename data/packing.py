"""Filling slots well: pieces of documents into rows, and rows of a step into micro-batches.

Numbers alone: lengths in, places out. Nothing here knows what a token is.

[Note: best fit]
Rows are bins of `seq_length` slots. Pieces come longest first, those of one length by their
numbers, and each goes into the row with the least room that holds it (best fit decreasing; Ding et
al. 2024, "Fewer truncations improve language modeling"); of rows with equal room, into the one that
has had this room for longest; if there is none, into a new row.

Pieces of one length go in together, because the row that one has gone into has now the least room,
so it takes the next too if it can: a row with room r takes r // length of them. Rows of equal room
are a queue of arrays, so the work is one visit for each array, not one for each piece.

[Note: rows of similar length]
A micro-batch is as wide as its longest row. The samples of a step are what they are, but which of
them share a micro-batch is free: gradients are summed over all of them. So the step's rows are
sorted by length, and ranks and micro-batches take neighbours. Which samples a step has, and what
each of them gives, does not change; nor does their order over steps.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
# (lengths of a step's rows, micro_batch_size, dp_rank, dp_size) -> rows of each micro-batch
Deal = Callable[[Int64Array, int, int, int], list[Int64Array]]


def best_fit(lengths: Int64Array, capacity: int) -> Int64Array:
    """Returns the row of each piece, `[n]`, counted from 0; see [Note: best fit].

    `lengths` `[n]` are at least 1 and at most `capacity`.
    """
    # Sorted as what is missing to a full row: numpy sorts 16-bit integers by radix.
    missing = (capacity - lengths).astype(np.min_scalar_type(capacity))
    order = np.argsort(missing, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    row_of_sorted = np.empty(len(lengths), dtype=np.int64)
    rows = _OpenRows(capacity)
    num_placed = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = num_placed + int(counts[length])
        while num_placed < end:
            taken = rows.put(length, end - num_placed)
            row_of_sorted[num_placed : num_placed + len(taken)] = taken
            num_placed += len(taken)
    row_of_piece = np.empty_like(row_of_sorted)
    row_of_piece[order] = row_of_sorted
    return row_of_piece


class _OpenRows:
    """Rows that have room, by how much."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_rows = 0
        self._rooms: list[int] = []  # ascending; those that some row has
        self._rows: dict[int, deque[Int64Array]] = {}  # of each room, those that came first ahead

    def put(self, length: int, num_pieces: int) -> Int64Array:
        """Places pieces of one length, at most so many and at least one; returns their rows."""
        room, rows = self._take(length, num_pieces)
        per_row = room // length
        num_rows = min(len(rows), -(-num_pieces // per_row))
        num_placed = min(num_pieces, num_rows * per_row)
        num_full = num_placed // per_row
        if num_rows < len(rows):
            self._rows[room].appendleft(rows[num_rows:])
        elif room in self._rows and not self._rows[room]:
            del self._rooms[bisect_left(self._rooms, room)]
            del self._rows[room]
        self._add(room - per_row * length, rows[:num_full])
        # The last row may get fewer than it has room for.
        self._add(room - num_placed % per_row * length, rows[num_full:num_rows])
        return np.repeat(rows[:num_rows], per_row)[:num_placed]

    def _take(self, length: int, num_pieces: int) -> tuple[int, Int64Array]:
        """Returns the least room that holds the length, and rows that have it, new ones if need be.

        They are no longer in their queue.
        """
        place = bisect_left(self._rooms, length)
        if place < len(self._rooms):
            room = self._rooms[place]
            return room, self._rows[room].popleft()
        first = self._num_rows
        self._num_rows += -(-num_pieces // (self._capacity // length))
        return self._capacity, np.arange(first, self._num_rows, dtype=np.int64)

    def _add(self, room: int, rows: Int64Array) -> None:
        """Rows that have this room from now on."""
        if not room or not len(rows):
            return
        if room not in self._rows:
            insort(self._rooms, room)
            self._rows[room] = deque()
        self._rows[room].append(rows)


def assign_in_order(
    lengths: Int64Array, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Int64Array]:
    """Returns the rows of each micro-batch of a rank, by their numbers in the step.

    A rank takes a contiguous share of them; their lengths do not matter.
    """
    share = len(lengths) // dp_size
    rows = np.arange(dp_rank * share, (dp_rank + 1) * share, dtype=np.int64)
    return np.split(rows, range(micro_batch_size, share, micro_batch_size))


def assign_by_length(
    lengths: Int64Array, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Int64Array]:
    """Returns the rows of each micro-batch of a rank; see [Note: rows of similar length].

    Groups of micro_batch_size x dp_size rows are dealt over the ranks, so all have as many
    micro-batches, and of similar width at the same time. The widest come first: memory that held
    them holds the others. Inside a micro-batch rows are in the order of their numbers.
    """
    order = np.argsort(-lengths, kind="stable")
    group_size = micro_batch_size * dp_size
    groups = np.split(order, range(group_size, len(order), group_size))
    return [np.sort(group.reshape(dp_size, -1)[dp_rank]) for group in groups]


def padding_fraction(
    lengths: Int64Array,
    deal: Deal,
    batch_size: int,
    micro_batch_size: int,
    dp_size: int,
    multiple_of: int,
) -> float:
    """Returns the share of slots that hold no input, in steps of `batch_size` rows each.

    `lengths` are those of the rows of all steps; widths are rounded up to `multiple_of`.
    """
    micro_batches = [
        first + part
        for first in range(0, len(lengths), batch_size)
        for dp_rank in range(dp_size)
        for part in deal(lengths[first : first + batch_size], micro_batch_size, dp_rank, dp_size)
    ]
    num_rows = np.array([len(rows) for rows in micro_batches])
    dealt = lengths[np.concatenate(micro_batches)]
    widths = np.maximum.reduceat(dealt, np.cumsum(num_rows) - num_rows)
    widths += -widths % multiple_of
    return 1 - float(dealt.sum() / (num_rows * widths).sum())
