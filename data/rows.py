"""Rows of tokens: where they lie in a token file, and micro-batches made of them.

A row is a span of the token stream: `length` inputs from `start`, and as targets the same span one
token further. The two sequence modes differ only in which spans are rows.

    pack   row k is tokens [k s, k s + s): documents follow each other without regard to rows
    pad    row j of a document is its tokens [j s, j s + s), the last row shorter

Documents that share a row can be kept apart: positions begin again with each, its number goes along
for attention to keep inside it, and the first token of the next one is no target.

Legend: s = seq_length, b = rows of a micro-batch. Batch first here: [b, s].
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.token_file import Tokens

IGNORED_TARGET = -100  # torch's default for ignored targets

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward, each padded to the same width."""

    tokens: Tensor  # [b, s] int64; eos in padded slots
    targets: Tensor  # [b, s] int64; IGNORED_TARGET where nothing is scored
    positions: Tensor  # [b, s] int64; 0 in padded slots
    sample_indices: Tensor  # [b] int64, number of the row in the run's order of consumption
    num_targets: int  # targets that are scored
    documents: Tensor | None = None  # [b, s] int64, a number for each document; None: all one

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


class Rows(Protocol):
    """The rows of a split: how many there are, and the span of each."""

    def __len__(self) -> int: ...

    def spans(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (starts, lengths) of rows given by number."""
        ...


class PackedRows:
    """Rows of mode `pack`: all of the same length, without regard to documents."""

    def __init__(self, file: Tokens, seq_length: int) -> None:
        self._seq_length = seq_length
        # The last target of a row is the first input of the next, so the stream needs one token
        # more.
        self._num_rows = max(0, file.num_tokens - 1) // seq_length

    def __len__(self) -> int:
        return self._num_rows

    def spans(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (starts, lengths) of rows given by number."""
        return rows * self._seq_length, np.full(len(rows), self._seq_length, dtype=np.int64)


class PaddedRows:
    """Rows of mode `pad`: each document by itself, a long one as several rows.

    `trailing_tokens` at the end of every document (its eos) are left out of the targets.
    """

    def __init__(self, file: Tokens, seq_length: int, trailing_tokens: int = 0) -> None:
        self._seq_length = seq_length
        self._document_starts = file.document_offsets[:-1]
        num_tokens = np.diff(file.document_offsets) - trailing_tokens
        self._num_inputs = np.maximum(0, num_tokens - 1)  # the last token is only a target
        self.rows_per_document: Int64Array = -(-self._num_inputs // seq_length)
        self._first_rows = np.concatenate([[0], np.cumsum(self.rows_per_document)])

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def spans(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (starts, lengths) of rows given by number."""
        # Documents without rows share their first row with the next one; "right" skips them.
        documents = np.searchsorted(self._first_rows, rows, side="right") - 1
        skipped = (rows - self._first_rows[documents]) * self._seq_length
        starts = self._document_starts[documents] + skipped
        return starts, np.minimum(self._seq_length, self._num_inputs[documents] - skipped)

    def rows_of(self, document: int) -> Int64Array:
        """Returns the numbers of a document's rows."""
        return np.arange(self._first_rows[document], self._first_rows[document + 1], dtype=np.int64)


def training_rows(
    file: Tokens, seq_length: int, sequence_mode: Literal["pack", "pad"]
) -> PackedRows | PaddedRows:
    """Returns the rows of an epoch in the given mode."""
    rows = PackedRows if sequence_mode == "pack" else PaddedRows
    return rows(file, seq_length)


def make_micro_batch(
    file: Tokens,
    spans: tuple[Int64Array, Int64Array],
    sample_indices: Int64Array,
    multiple_of: int,
    padding_token: int,
    *,
    keep_documents_apart: bool = False,
) -> MicroBatch:
    """Reads rows and pads them to the longest one, rounded up to a multiple of `multiple_of`.

    `keep_documents_apart`: for rows that several documents share.
    """
    starts, lengths = spans
    width = max(1, int(lengths.max()))
    width += -width % multiple_of
    tokens = np.full((len(starts), width), padding_token, dtype=np.int64)
    targets = np.full((len(starts), width), IGNORED_TARGET, dtype=np.int64)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        span = file.span(start, start + length + 1)
        tokens[row, :length] = span[:-1]
        targets[row, :length] = span[1:]
    columns = np.arange(width, dtype=np.int64)
    is_padding = columns >= lengths[:, None]
    positions, documents = np.where(is_padding, 0, columns), None
    if keep_documents_apart:
        places = np.minimum(starts[:, None] + columns, file.num_tokens - 1)  # in the token stream
        documents = np.searchsorted(file.document_offsets, places, side="right") - 1
        # A row may begin inside a document: its positions begin with the row.
        first = np.maximum(file.document_offsets[documents], starts[:, None])
        positions = np.where(is_padding, 0, places - first)
        next_starts = file.document_offsets[documents + 1]
        targets[places + 1 == next_starts] = IGNORED_TARGET
        documents[is_padding] = -1
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(sample_indices),
        int((targets != IGNORED_TARGET).sum()),
        None if documents is None else torch.from_numpy(documents),
    )
