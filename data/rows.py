"""Rows of tokens, and micro-batches made of them.

A row is one or more spans of the token stream. A span of `length` tokens gives that many inputs;
its targets are the same tokens shifted by one.

    pack, stream    the tokens of a source, cut every s tokens whatever the documents
    pad             each document, cut every s tokens; its last row is shorter
    pack, best_fit  the rows of pad, joined into rows of at most s inputs (data/packing.py)

With inter-document masking the documents of a row are kept apart: positions restart at each
document, attention stays inside it, and its last token does not predict the next document.

Pairs and conversations (data/corpus/segments.py) are not cut: one that is longer than s inputs is
truncated, and it has no row if that leaves no target. Tokens of contexts are not targets.

Legend: s = seq_length, b = rows of a micro-batch. Batch first here: [b, s].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.packing import Int64Array, best_fit
from data.token_file import Tokens
from ops.balance import balanced_positions
from ops.segments import Documents, KeyBlocks, make_key_blocks

IGNORED_TARGET = -100  # torch's default for ignored targets
_MODEL_INPUTS = ("tokens", "positions", "targets")


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward and backward pass, padded to the same width.

    With context parallelism, this rank's positions of them, `[b, s/c]`.
    """

    tokens: Tensor  # [b, s] int64; eos in padded slots
    targets: Tensor  # [b, s] int64; IGNORED_TARGET where nothing is scored
    positions: Tensor  # [b, s] int64; 0 in padded slots
    sample_indices: Tensor  # [b] int64, numbers of the samples in the run
    num_targets: int  # without ignored ones
    documents: Documents | None = None  # of whole rows; None: not kept apart
    dropout_keys: Tensor | None = None  # [1 + 2 L, 2, b] int32, of all sites in the model
    key_blocks: KeyBlocks | None = None  # of `documents`, set by `of_cp_rank`

    @property
    def sum_of_lengths(self) -> int:
        """The length of each target's row (or document, if kept apart), summed over targets.

        A row of n targets adds n^2, which is the sum of 2 p + 1 over its positions p.
        """
        return int(((2 * self.positions + 1) * (self.targets != IGNORED_TARGET)).sum())

    def inputs(self) -> dict[str, Any]:
        """Return the model's arguments by name."""
        assert (self.documents is None) == (self.key_blocks is None), "call of_cp_rank first"
        return {name: getattr(self, name) for name in (*_MODEL_INPUTS, "key_blocks")}

    def of_cp_rank(self, cp_rank: int = 0, cp_size: int = 1) -> "MicroBatch":
        """Return the positions of one context-parallel rank, and the keys that they see."""
        width, key_blocks = self.tokens.shape[1], None
        if self.documents is not None:
            key_blocks = make_key_blocks(width, self.documents, cp_rank, cp_size)
        if cp_size == 1:
            return replace(self, key_blocks=key_blocks)
        columns = balanced_positions(width, cp_rank, cp_size)
        targets = self.targets[:, columns]
        return replace(
            self,
            tokens=self.tokens[:, columns],
            targets=targets,
            positions=self.positions[:, columns],
            num_targets=int((targets != IGNORED_TARGET).sum()),
            key_blocks=key_blocks,
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same rows on a device; pinned ones are copied asynchronously."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "MicroBatch":
        """Return the same rows in page-locked memory, which a GPU can copy asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        of_device = {name: getattr(self, name) for name in (*_MODEL_INPUTS, "dropout_keys")}
        mapped: dict[str, Any] = {n: function(t) for n, t in of_device.items() if t is not None}
        if self.key_blocks is not None:
            mapped["key_blocks"] = {n: block.map(function) for n, block in self.key_blocks.items()}
        return replace(self, **mapped)


class Spans(NamedTuple):
    """Spans of a token stream and the slots they fill, row by row; all `[n]`."""

    starts: Int64Array  # in the stream
    lengths: Int64Array  # inputs
    rows: Int64Array  # of the micro-batch
    columns: Int64Array  # of the first input

    def row_lengths(self, num_rows: int) -> Int64Array:
        """Return the number of inputs of each row, `[num_rows]`."""
        return np.bincount(self.rows, self.lengths, num_rows).astype(np.int64)  # exact to 2^53


class Truncation:
    """The inputs of each document in rows of at most `seq_length` that cut only texts.

    Reads no tokens. Pairs and conversations lose what does not fit, and have no inputs if that
    leaves no target.
    """

    def __init__(self, tokens: Tokens, seq_length: int) -> None:
        starts, stops = tokens.document_offsets[:-1], tokens.document_offsets[1:]
        self.num_inputs = np.maximum(0, stops - starts - 1)  # the last token is only a target
        self.is_text = np.repeat(
            [part.targets is None for part in tokens.parts],
            [part.num_documents for part in tokens.parts],
        )
        self.is_cut = ~self.is_text & (self.num_inputs > seq_length)
        self.num_inputs[self.is_cut] = seq_length
        self.num_lost = self.num_empty = 0  # targets, and documents without any other
        self._seq_length = seq_length
        if tokens.targets is not None:
            ends = starts + 1 + self.num_inputs
            self.num_lost = int(tokens.targets.count(ends, stops).sum())
            is_empty = ~self.is_text & (tokens.targets.count(starts, ends) == 0)
            self.num_inputs[is_empty] = 0
            self.num_empty = int(is_empty.sum())

    def describe(self) -> str | None:
        """Say what is lost; None: nothing."""
        if not self.is_cut.any():
            return None
        return (
            f"{self.is_cut.sum():,} of {(~self.is_text).sum():,} are longer than model.seq_length="
            f"{self._seq_length} and truncated, which loses {self.num_lost:,} targets; "
            f"{self.num_empty:,} are skipped because they have no other target"
        )


class Rows:
    """The rows of one epoch, numbered source by source.

    Stretches of the token stream (sources or documents) are cut into pieces of `seq_length`
    inputs, the last one shorter. A row is one piece; with `best_fit`, several of one source.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_length: int,
        sequence_mode: Literal["pack", "pad"],
        packing: Literal["stream", "best_fit"] | None = "stream",
    ) -> None:
        self._seq_length = seq_length
        self.truncation = Truncation(tokens, seq_length)
        # The last token of a stretch is only a target.
        if sequence_mode == "pack" and packing == "stream":
            num_tokens = np.array([part.num_tokens for part in tokens.parts])
            self._starts = np.cumsum(num_tokens) - num_tokens
            self._num_inputs = np.maximum(0, num_tokens - 1) // seq_length * seq_length
            stretches_of_sources = [1] * len(num_tokens)
        else:
            self._starts = tokens.document_offsets[:-1]
            self._num_inputs = self.truncation.num_inputs
            stretches_of_sources = [part.num_documents for part in tokens.parts]
        self._first_pieces = _offsets(-(-self._num_inputs // seq_length))
        first_of_sources = self._first_pieces[_offsets(stretches_of_sources)]
        self.rows_of_sources: list[int] = np.diff(first_of_sources).tolist()
        self._pieces: Int64Array | None = None  # None: row i is piece i
        if sequence_mode == "pack" and packing == "best_fit":
            lengths = self.spans(np.arange(first_of_sources[-1])).lengths
            by_source = np.split(lengths, first_of_sources[1:-1])
            packed = [best_fit(each, seq_length) for each in by_source]
            self.rows_of_sources = [int(each.max(initial=-1)) + 1 for each in packed]
            firsts = _offsets(self.rows_of_sources)[:-1]
            row_of_piece = np.concatenate([a + b for a, b in zip(packed, firsts, strict=True)])
            self._pieces = np.argsort(row_of_piece, kind="stable")  # grouped by row
            self._first_in_row = _offsets(np.bincount(row_of_piece))

    def __len__(self) -> int:
        return sum(self.rows_of_sources)

    def spans(self, rows: Int64Array) -> Spans:
        """Return the spans of the given rows, as rows 0, 1, ... of a micro-batch."""
        pieces = rows
        row = first_span = np.arange(len(rows))
        if self._pieces is not None:
            firsts = self._first_in_row[rows]
            row = np.repeat(row, self._first_in_row[rows + 1] - firsts)
            first_span = np.searchsorted(row, row)  # of the span's row
            pieces = self._pieces[firsts[row] + np.arange(len(row)) - first_span]
        # A stretch without pieces has the same first piece as the next one; "right" skips it.
        stretches = np.searchsorted(self._first_pieces, pieces, side="right") - 1
        skipped = (pieces - self._first_pieces[stretches]) * self._seq_length
        lengths = np.minimum(self._seq_length, self._num_inputs[stretches] - skipped)
        before = np.cumsum(lengths) - lengths
        columns = before - before[first_span]
        return Spans(self._starts[stretches] + skipped, lengths, row, columns)

    def lengths(self, rows: Int64Array) -> Int64Array:
        """Return the number of inputs of each of the given rows."""
        return self.spans(rows).row_lengths(len(rows))


def count_targets(file: Tokens, spans: Spans, *, keep_documents_apart: bool) -> int:
    """Return the number of targets of rows, without reading them. No document may be empty."""
    if file.targets is not None:
        return int(file.targets.count(spans.starts + 1, spans.starts + 1 + spans.lengths).sum())
    total = int(spans.lengths.sum())
    if keep_documents_apart:  # the last token of a document does not predict the next one
        stops = spans.starts + spans.lengths
        first, last = np.searchsorted(file.document_offsets, [spans.starts, stops], side="right")
        total -= int((last - first).sum())
    return total


def _offsets(counts: Int64Array | list[int]) -> Int64Array:
    """Return 0 and the running sums of counts."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def make_micro_batch(
    file: Tokens,
    spans: Spans,
    sample_indices: Int64Array,
    multiple_of: int,
    padding_token: int,
    *,
    keep_documents_apart: bool = False,
) -> MicroBatch:
    """Read rows and pad them to the longest one, rounded up to a multiple of `multiple_of`."""
    lengths = spans.row_lengths(len(sample_indices))
    width = max(1, int(lengths.max()))
    width += -width % multiple_of
    tokens = np.full((len(lengths), width), padding_token, dtype=np.int64)
    targets = np.full_like(tokens, IGNORED_TARGET)
    first_columns = np.zeros_like(tokens)  # of the slot's document
    for start, length, row, column in zip(*(values.tolist() for values in spans), strict=True):
        end = column + length
        span = file.span(start, start + length + 1)
        tokens[row, column:end], targets[row, column:end] = span[:-1], span[1:]
        if file.targets is not None:
            is_target = file.targets.contains(np.arange(start + 1, start + length + 1))
            targets[row, column:end][~is_target] = IGNORED_TARGET
        if keep_documents_apart:
            offsets = file.document_offsets
            first, last = np.searchsorted(offsets, [start, start + length], side="right")
            begins = offsets[first:last] - start + column
            targets[row, begins - 1] = IGNORED_TARGET
            # A row may begin inside a document; positions then count from the row's beginning.
            begins = np.append(begins[begins < end], column)
            first_columns[row, begins] = begins
    columns = np.arange(width)
    is_padding = columns >= lengths[:, None]
    first_columns = np.maximum.accumulate(first_columns, axis=1)
    positions = np.where(is_padding, 0, columns - first_columns)
    documents = None
    if keep_documents_apart:
        first_columns[is_padding] = -1
        documents = [[0, *(np.flatnonzero(np.diff(row)) + 1).tolist()] for row in first_columns]
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions),
        torch.from_numpy(sample_indices),
        int((targets != IGNORED_TARGET).sum()),
        documents,
    )
