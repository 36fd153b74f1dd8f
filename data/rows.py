"""Rows of tokens: where they lie in a token file, and micro-batches made of them.

A row is one or more spans of the token stream, one after another: of each, `length` inputs from
`start`, and as targets the same span one token further. What differs is only which spans are rows.

    pack, stream     row k is tokens [k s, k s + s): documents follow each other without regard to
                     rows
    pad              row j of a document is its tokens [j s, j s + s), the last row shorter
    pack, best_fit   rows of pad, put together so that they fill rows of s: see data/packing.py

Documents that share a row can be kept apart: positions begin again with each, its number goes along
for attention to keep inside it, and the first token of the next one is no target.

Legend: s = seq_length, b = rows of a micro-batch. Batch first here: [b, s].
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from data.packing import Int64Array, best_fit
from data.token_file import Tokens

IGNORED_TARGET = -100  # torch's default for ignored targets


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward, each padded to the same width."""

    tokens: Tensor  # [b, s] int64; eos in padded slots
    targets: Tensor  # [b, s] int64; IGNORED_TARGET where nothing is scored
    positions: Tensor  # [b, s] int64; 0 in padded slots
    sample_indices: Tensor  # [b] int64, number of the row in the run's order of consumption
    num_targets: int  # targets that are scored
    # [b, s] int64, the column at which the slot's document begins, -1 in padding; None: all one
    documents: Tensor | None = None

    @property
    def sum_of_lengths(self) -> int:
        """Over targets, of the length of their row, or of their document if those are kept apart.

        A row of n targets adds n^2, which is the sum of 2 p + 1 over its positions p.
        """
        return int(((2 * self.positions + 1) * (self.targets != IGNORED_TARGET)).sum())

    def inputs(self, device: torch.device) -> dict[str, Tensor | None]:
        """What the model is given, by its names, on its device."""
        return {
            name: None if tensor is None else tensor.to(device, non_blocking=True)
            for name, tensor in (
                ("tokens", self.tokens),
                ("positions", self.positions),
                ("targets", self.targets),
                ("documents", self.documents),
            )
        }

    def pin_memory(self) -> "MicroBatch":
        """Returns the same rows in page-locked memory, from which a GPU copies without waiting."""
        return MicroBatch(
            self.tokens.pin_memory(),
            self.targets.pin_memory(),
            self.positions.pin_memory(),
            self.sample_indices,  # only the host reads them
            self.num_targets,
            None if self.documents is None else self.documents.pin_memory(),
        )


@dataclass(frozen=True)
class Spans:
    """Pieces of a token file, and the slots of a micro-batch that they fill; all `[n]`.

    Those of one row follow each other.
    """

    starts: Int64Array  # in the token file
    lengths: Int64Array  # inputs
    rows: Int64Array  # of the micro-batch
    columns: Int64Array  # of the first input

    @staticmethod
    def of_rows(starts: Int64Array, lengths: Int64Array) -> "Spans":
        """Rows of one span each."""
        rows = np.arange(len(starts), dtype=np.int64)
        return Spans(starts, lengths, rows, np.zeros_like(rows))


class Rows(Protocol):
    """The rows of a split: how many there are, and the spans of each."""

    def __len__(self) -> int: ...

    def spans(self, rows: Int64Array) -> Spans:
        """Returns the spans of rows given by number, as rows 0, 1, ... of a micro-batch."""
        ...

    def lengths(self, rows: Int64Array) -> Int64Array:
        """Returns how many slots of rows given by number hold an input."""
        ...


class PackedRows:
    """Rows of packing `stream`: all of the same length, without regard to documents."""

    def __init__(self, file: Tokens, seq_length: int) -> None:
        self._seq_length = seq_length
        # The last target of a row is the first input of the next, so the stream needs one token
        # more.
        self._num_rows = max(0, file.num_tokens - 1) // seq_length

    def __len__(self) -> int:
        return self._num_rows

    def spans(self, rows: Int64Array) -> Spans:
        """Returns the spans of rows given by number."""
        return Spans.of_rows(rows * self._seq_length, self.lengths(rows))

    def lengths(self, rows: Int64Array) -> Int64Array:
        """Returns the inputs of rows given by number."""
        return np.full(len(rows), self._seq_length, dtype=np.int64)


class PaddedRows:
    """Rows of mode `pad`: each document by itself, a long one as several rows."""

    def __init__(self, file: Tokens, seq_length: int) -> None:
        self._seq_length = seq_length
        self._document_starts = file.document_offsets[:-1]
        num_tokens = np.diff(file.document_offsets)
        self._num_inputs = np.maximum(0, num_tokens - 1)  # the last token is only a target
        rows_per_document = -(-self._num_inputs // seq_length)
        self._first_rows = np.concatenate([[0], np.cumsum(rows_per_document)])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def spans(self, rows: Int64Array) -> Spans:
        """Returns the spans of rows given by number."""
        documents, skipped = self._places(rows)
        return Spans.of_rows(self._document_starts[documents] + skipped, self.lengths(rows))

    def lengths(self, rows: Int64Array) -> Int64Array:
        """Returns the inputs of rows given by number."""
        documents, skipped = self._places(rows)
        return np.minimum(self._seq_length, self._num_inputs[documents] - skipped)

    def _places(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (documents, inputs of the document before the row)."""
        # Documents without rows share their first row with the next one; "right" skips them.
        documents = np.searchsorted(self._first_rows, rows, side="right") - 1
        return documents, (rows - self._first_rows[documents]) * self._seq_length


class BestFitRows:
    """Rows of packing `best_fit`: pieces, which are rows of mode `pad`, in rows as full as can be.

    In a row, pieces are in the order of the file.
    """

    def __init__(self, pieces: PaddedRows, seq_length: int) -> None:
        self._pieces = pieces
        lengths = pieces.lengths(np.arange(len(pieces), dtype=np.int64))
        row_of_piece = best_fit(lengths, seq_length)
        self._of_rows = np.argsort(row_of_piece, kind="stable")  # pieces, those of row 0 first
        self._lengths = np.bincount(row_of_piece, weights=lengths).astype(np.int64)  # exact to 2^53
        num_pieces = np.bincount(row_of_piece)
        self._first_pieces = np.concatenate([[0], np.cumsum(num_pieces)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._first_pieces) - 1

    def spans(self, rows: Int64Array) -> Spans:
        """Returns the spans of rows given by number."""
        num_pieces = self._first_pieces[rows + 1] - self._first_pieces[rows]
        of_row = np.repeat(np.arange(len(rows), dtype=np.int64), num_pieces)
        firsts = np.cumsum(num_pieces) - num_pieces  # of each row, among the spans
        places = np.arange(len(of_row)) + (self._first_pieces[rows] - firsts)[of_row]
        spans = self._pieces.spans(self._of_rows[places])
        before = np.cumsum(spans.lengths) - spans.lengths  # inputs of all spans before
        return Spans(spans.starts, spans.lengths, of_row, before - before[firsts][of_row])

    def lengths(self, rows: Int64Array) -> Int64Array:
        """Returns the inputs of rows given by number."""
        return self._lengths[rows]


def training_rows(
    file: Tokens,
    seq_length: int,
    sequence_mode: Literal["pack", "pad"],
    packing: Literal["stream", "best_fit"] = "stream",
) -> Rows:
    """Returns the rows of an epoch in the given mode."""
    if sequence_mode == "pack" and packing == "stream":
        return PackedRows(file, seq_length)
    rows = PaddedRows(file, seq_length)
    return rows if sequence_mode == "pad" else BestFitRows(rows, seq_length)


def make_micro_batch(
    file: Tokens,
    spans: Spans,
    sample_indices: Int64Array,
    multiple_of: int,
    padding_token: int,
    *,
    keep_documents_apart: bool = False,
) -> MicroBatch:
    """Reads rows and pads them to the longest one, rounded up to a multiple of `multiple_of`.

    `keep_documents_apart`: for rows that several documents share.
    """
    width = max(1, int((spans.columns + spans.lengths).max()))
    width += -width % multiple_of
    shape = len(sample_indices), width
    tokens = np.full(shape, padding_token, dtype=np.int64)
    targets = np.full(shape, IGNORED_TARGET, dtype=np.int64)
    first_columns = np.full(shape, -1, dtype=np.int64)  # of each slot's document; -1: padding
    for start, length, row, column in zip(
        spans.starts.tolist(),
        spans.lengths.tolist(),
        spans.rows.tolist(),
        spans.columns.tolist(),
        strict=True,
    ):
        slots = slice(column, column + length)
        span = file.span(start, start + length + 1)
        tokens[row, slots], targets[row, slots] = span[:-1], span[1:]
        first_columns[row, slots] = 0
        if keep_documents_apart:
            begins = _document_starts(file, start, start + length) - start
            targets[row, column + begins - 1] = IGNORED_TARGET
            # A row may begin inside a document: its positions begin with the row.
            document = np.searchsorted(begins, np.arange(length), side="right")
            first_columns[row, slots] = column + np.concatenate([[0], begins])[document]
    columns = np.arange(width, dtype=np.int64)
    positions = np.where(first_columns < 0, 0, columns - first_columns)
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(sample_indices),
        int((targets != IGNORED_TARGET).sum()),
        torch.from_numpy(first_columns) if keep_documents_apart else None,
    )


def _document_starts(file: Tokens, start: int, last: int) -> Int64Array:
    """Returns where documents begin in (start, last]."""
    first, end = np.searchsorted(file.document_offsets, [start, last], side="right")
    return file.document_offsets[first:end]
