"""Arithmetic of lengths: pieces of documents into rows, and rows of a step into micro-batches.

[Note: best fit]
Rows are bins of `seq_length` slots. Pieces are placed longest first, equal lengths in order. Each
goes into the row with the least room that holds it (best-fit decreasing; Ding et al. 2024, "Fewer
truncations improve language modeling"), of several into the one that has had this room longest,
else into a new row.

A row with room r takes r // length pieces of one length in turn: after each piece it is the fullest
row that still fits. So all rows of equal room are filled at once.

[Note: rows of similar length]
A micro-batch is as wide as its longest row. Gradients are summed over all micro-batches of a step,
so the step's rows may share micro-batches in any way. Mode `pad` sorts them by length and lets
neighbours share a micro-batch. The samples of a step and their order over steps stay the same.
"""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


def best_fit(lengths: Int64Array, capacity: int) -> Int64Array:
    """Return the row of each piece, `[n]`; see [Note: best fit]. Lengths are 1 .. capacity."""
    rooms: list[int] = []  # of the rows that are not full, ascending
    rows_by_room: dict[int, list[Int64Array]] = {}  # those with this room longest come first
    row_of_sorted = [np.empty(0, dtype=np.int64)]
    num_rows = 0

    def add(room: int, rows: Int64Array) -> None:
        if room and len(rows):
            if room not in rows_by_room:
                insort(rooms, room)
            rows_by_room.setdefault(room, []).append(rows)

    counts = np.bincount(lengths, minlength=capacity + 1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        num_left = int(counts[length])
        while num_left:
            index = bisect_left(rooms, length)
            if index == len(rooms):
                num_new = -(-num_left // (capacity // length))
                add(capacity, np.arange(num_rows, num_rows + num_new))
                num_rows += num_new
            room = rooms.pop(index)
            arrays = rows_by_room.pop(room)
            rows = np.concatenate(arrays) if arrays[1:] else arrays[0]
            per_row = room // length
            placed = np.repeat(rows[: -(-num_left // per_row)], per_row)[:num_left]
            row_of_sorted.append(placed)
            num_left -= len(placed)
            num_full, rest = divmod(len(placed), per_row)
            add(room - per_row * length, rows[:num_full])
            num_used = num_full + (rest > 0)
            add(room - rest * length, rows[num_full:num_used])
            add(room, rows[num_used:])
    # Sort by the room that a piece leaves: numpy sorts 16-bit integers by radix.
    order = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    row_of_piece = np.empty_like(lengths)
    row_of_piece[order] = np.concatenate(row_of_sorted)
    return row_of_piece


def assign_in_order(
    lengths: Int64Array, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Int64Array]:
    """Return the rows of each micro-batch of a rank, which takes a contiguous share of the step."""
    share = len(lengths) // dp_size
    rows = np.arange(dp_rank * share, (dp_rank + 1) * share, dtype=np.int64)
    return np.split(rows, range(micro_batch_size, share, micro_batch_size))


def assign_by_length(
    lengths: Int64Array, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Int64Array]:
    """Return the rows of each micro-batch of a rank; see [Note: rows of similar length].

    All ranks have equally many micro-batches, and similar widths at the same time. The widest come
    first, so that their memory fits all others. Rows of a micro-batch are in order.
    """
    order = np.argsort(-lengths, kind="stable")
    group_size = micro_batch_size * dp_size
    groups = np.split(order, range(group_size, len(order), group_size))
    return [np.sort(group.reshape(dp_size, -1)[dp_rank]) for group in groups]
