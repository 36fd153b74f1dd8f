"""Training batches, prepared ahead of time by a background thread.

Step k of a run takes samples [k B, k B + B) with B = global_batch_size, whatever the layout. In
mode `pack` a data-parallel rank takes a contiguous share of them; in mode `pad` rows of similar
length share a micro-batch, to save padding. All ranks of a tensor-parallel group get equal batches.
Context-parallel ranks read the same rows, and each selects its positions.
"""

import logging
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Unpack

from torch.profiler import record_function

from configs.errors import UserError
from configs.schema import Config
from data.cached_corpus import Corpus
from data.packing import assign_by_length, assign_in_order
from data.rows import MicroBatch, Rows, count_targets, make_micro_batch
from data.sampler import SampleOrder
from ops.balance import CPRank, width_multiple
from ops.dropout import dropout_keys

WAITING_FOR_DATA = "waiting for data"  # in a torch.profiler trace
_PREFETCHED_STEPS = 2

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class StepBatch:
    """This data-parallel rank's share of one step."""

    micro_batches: list[MicroBatch]
    num_targets: int  # of the global batch
    sum_of_lengths: int  # of the micro-batches


class BatchLoader(Iterator[StepBatch]):
    """Endless iterator over the batches of successive steps; a context manager ends its thread."""

    def __init__(
        self,
        corpus: Corpus,
        config: Config,
        *,
        consumed_samples: int,
        first_step: int,
        dp_rank: int,
        dp_size: int,
        tp_size: int,
        device_is_cuda: bool,
        **cp: Unpack[CPRank],
    ) -> None:
        self._batch_size = config.train.global_batch_size
        if self._batch_size % dp_size:
            raise UserError(
                f"train.global_batch_size={self._batch_size} is not divisible by the "
                f"data-parallel size {dp_size}; choose a multiple of {dp_size}"
            )
        self._rows = rows_of_corpus(corpus, config)
        self._order = SampleOrder(corpus.weights, self._rows.rows_of_sources, config.run.seed)
        self._corpus, self._config = corpus, config
        is_padded = config.data.sequence_mode == "pad"
        self._assign = assign_by_length if is_padded else assign_in_order
        self._dp_rank, self._dp_size, self._cp = dp_rank, dp_size, cp
        self._multiple_of = width_multiple(cp.get("cp_size", 1), tp_size)
        self._pin_memory = device_is_cuda
        lost = self._rows.truncation.describe()
        if lost and logger.isEnabledFor(logging.INFO):  # rank 0
            logger.warning("of the training documents, %s", lost)
        self._steps = self._prefetch(first_step, consumed_samples)

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()  # ends the thread and drops the prefetched batches

    def __next__(self) -> StepBatch:
        """Return the next step's batch, or raise the error of the thread and end."""
        with record_function(WAITING_FOR_DATA):
            return next(self._steps)

    def _prefetch(self, step: int, first_sample: int) -> Generator[StepBatch]:
        executor = ThreadPoolExecutor(1, "batch-loader")
        steps: deque[Future[StepBatch]] = deque()
        try:
            while True:
                while len(steps) <= _PREFETCHED_STEPS:
                    steps.append(executor.submit(self._make_step, step, first_sample))
                    step, first_sample = step + 1, first_sample + self._batch_size
                yield steps.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)

    def _make_step(self, step: int, first_sample: int) -> StepBatch:
        model, masked = self._config.model, self._config.data.masks_documents
        rows = self._order.rows(first_sample, self._batch_size)
        layout = (self._config.train.micro_batch_size, self._dp_rank, self._dp_size)
        micro_batches = []
        for part in self._assign(self._rows.lengths(rows), *layout):
            micro_batch = make_micro_batch(
                self._corpus.train,
                self._rows.spans(rows[part]),
                first_sample + part,
                self._multiple_of,
                self._corpus.tokenizer.eos_id,
                keep_documents_apart=masked,
            ).of_cp_rank(**self._cp)
            if model.hidden_dropout > 0:
                seed, samples = self._config.run.seed, micro_batch.sample_indices.tolist()
                keys = dropout_keys(seed, step, samples, model.num_layers)
                micro_batch = replace(micro_batch, dropout_keys=keys)
            micro_batches.append(micro_batch.pin_memory() if self._pin_memory else micro_batch)
        return StepBatch(
            micro_batches,
            count_targets(self._corpus.train, self._rows.spans(rows), keep_documents_apart=masked),
            sum(micro_batch.sum_of_lengths for micro_batch in micro_batches),
        )


def rows_of_corpus(corpus: Corpus, config: Config) -> Rows:
    """Return the rows of training. Raise UserError if a source has none."""
    data, seq_length = config.data, config.model.seq_length
    rows = Rows(corpus.train, seq_length, data.sequence_mode, data.packing)
    for (key, source), num_rows in zip(data.mixture.items(), rows.rows_of_sources, strict=True):
        if not num_rows:
            fix = "use more text or a smaller model.seq_length"
            if source.format != "text":
                fix = "all their targets come later; use a larger model.seq_length"
            raise UserError(
                f"the training documents of {key}.source={source.source} give no row of "
                f"model.seq_length={seq_length} tokens; {fix}"
            )
    return rows
