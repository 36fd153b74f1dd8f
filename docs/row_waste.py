"""Measure what each way of making rows wastes, on a configuration's training documents.

    python -m docs.row_waste [config=NAME.yaml section.key=value ...]

Prints the table of docs/results.md, for one epoch on one data-parallel rank; with a configuration,
for its text and its model.seq_length. Every figure is counted on the spans that training reads.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from configs import Config, ModelConfig, load_config
from data import prepare_corpus
from data.loader import rows_of_corpus
from data.packing import Int64Array, assign_by_length, assign_in_order
from data.rows import Rows
from data.sampler import SampleOrder
from data.token_file import Tokens

# (lengths of a step's rows, micro_batch_size, dp_rank, dp_size) -> rows of each micro-batch
Assign = Callable[[Int64Array, int, int, int], list[Int64Array]]
_LENGTHS = (256, 1024, 2048)
_MODES: tuple[tuple[str, Literal["pack", "pad"], Literal["stream", "best_fit"], Assign], ...] = (
    ("pack, stream", "pack", "stream", assign_in_order),
    ("pack, best_fit", "pack", "best_fit", assign_in_order),
    ("pad, not grouped", "pad", "stream", assign_in_order),
    ("pad", "pad", "stream", assign_by_length),
)
_HEADER = (
    "| s | mode | rows | padded slots | short documents split | targets without their beginning "
    "| targets lost |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Cuts:
    """What rows do to documents; a document's targets are all its tokens but the first."""

    short_documents: int  # whose inputs would fit in one row
    short_split: int  # of those, in two rows or more
    targets: int  # of all documents
    without_beginning: int  # that an epoch scores in another row than that of their document's bos
    lost: int  # that an epoch does not score


def cuts(file: Tokens, rows: Rows, seq_length: int) -> Cuts:
    """Counts over all rows."""
    spans = rows.spans(np.arange(len(rows), dtype=np.int64))
    order = np.argsort(spans.starts)
    starts = spans.starts[order]
    ends = starts + spans.lengths[order]
    begins, stops = file.document_offsets[:-1], file.document_offsets[1:] - 1  # of inputs
    begins, stops = begins[stops > begins], stops[stops > begins]
    # Those spans that have an input of the document: the first that ends after its beginning ...
    first = np.searchsorted(ends, begins, side="right")
    num_spans = np.searchsorted(starts, stops, side="left") - first
    is_short = stops - begins <= seq_length
    scored = _covered(starts, ends, stops) - _covered(starts, ends, begins)
    in_first = np.minimum(stops, np.append(ends, 0)[first]) - begins
    return Cuts(
        short_documents=int(is_short.sum()),
        short_split=int((is_short & (num_spans > 1)).sum()),
        targets=int((stops - begins).sum()),
        without_beginning=int((scored - np.clip(in_first, 0, scored)).sum()),
        lost=int((stops - begins - scored).sum()),
    )


def _covered(starts: Int64Array, ends: Int64Array, places: Int64Array) -> Int64Array:
    """Returns how many places before each of `places` are in spans, which do not overlap."""
    before = np.concatenate([[0], np.cumsum(ends - starts)])
    number = np.searchsorted(starts, places, side="right")  # of spans that begin there or before
    beyond = np.maximum(0, np.append(0, ends)[number] - places)
    return before[number] - beyond


def padding_fraction(
    lengths: Int64Array,
    assign: Assign,
    batch_size: int,
    micro_batch_size: int,
    dp_size: int,
    multiple_of: int,
) -> float:
    """Return the fraction of slots without an input, over steps of `batch_size` rows each.

    `lengths` are those of the rows of all steps. Widths are rounded up to `multiple_of`.
    """
    num_slots = 0
    for step in np.split(lengths, range(batch_size, len(lengths), batch_size)):
        for dp_rank in range(dp_size):
            for rows in assign(step, micro_batch_size, dp_rank, dp_size):
                width = int(step[rows].max())
                num_slots += len(rows) * (width + -width % multiple_of)
    return 1 - int(lengths.sum()) / num_slots


def table(config: Config) -> list[str]:
    """Returns the lines for the model.seq_length of a configuration."""
    s, train = config.model.seq_length, config.train
    corpus = prepare_corpus(config.data, s, 0)
    lines = []
    for name, mode, packing, assign in _MODES:
        data = replace(config.data, sequence_mode=mode, packing=packing)
        rows = rows_of_corpus(corpus, replace(config, data=data))
        order = SampleOrder(corpus.weights, rows.rows_of_sources, config.run.seed)
        num_steps = max(1, len(rows) // train.global_batch_size)
        lengths = rows.lengths(order.rows(0, num_steps * train.global_batch_size))
        layout = (train.global_batch_size, train.micro_batch_size, 1, 1)
        padding = padding_fraction(lengths, assign, *layout)
        cut = cuts(corpus.train, rows, s)
        split = cut.short_split / max(1, cut.short_documents)
        lines.append(
            f"| {s} | {name} | {len(rows):,} | {padding:.2%} "
            f"| {cut.short_split:,} of {cut.short_documents:,} ({split:.1%}) "
            f"| {cut.without_beginning / cut.targets:.1%} | {cut.lost:,} |"
        )
    return lines


def main() -> int:
    """Print the table."""
    logging.getLogger("microtron").addHandler(logging.StreamHandler())
    if sys.argv[1:]:
        configs = [load_config(sys.argv[1:])]
    else:
        configs = [Config(model=ModelConfig(seq_length=length)) for length in _LENGTHS]
    lines = [line for config in configs for line in table(config)]
    sys.stdout.write("\n".join([*_HEADER, *lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
