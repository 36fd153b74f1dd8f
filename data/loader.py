"""Batches for training, made ahead of time by a background thread.

The batch of step k of a run is samples [k B, k B + B) with B = global_batch_size, whatever the
layout. In mode `pack` a data-parallel rank takes its contiguous share, in micro-batches that follow
each other; in mode `pad` rows of similar length share a micro-batch, for little padding.
Ranks of one tensor-parallel group construct the same loader and get equal batches.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass

from torch.profiler import record_function

from configs.errors import UserError
from configs.schema import Config
from data.corpus.prepare import Corpus
from data.mixture import JoinedRows, SampleOrder
from data.packing import Deal, assign_by_length, assign_in_order, padding_fraction
from data.rows import MicroBatch, Rows, make_micro_batch, training_rows

WAITING_FOR_DATA = "waiting for data"  # in a trace of torch.profiler
_STEPS_AHEAD = 2
_STOP_CHECK_INTERVAL_S = 0.1
_ROWS_OF_ESTIMATE = 4096  # of the first epoch, to tell the share of padding at the start

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class StepBatch:
    """This data-parallel rank's share of one step."""

    micro_batches: list[MicroBatch]
    num_targets: int  # of this rank


class BatchLoader:
    """Iterator over the batches of successive steps, without end: epochs follow each other."""

    def __init__(
        self,
        corpus: Corpus,
        config: Config,
        *,
        consumed_samples: int,
        dp_rank: int,
        dp_size: int,
        tp_size: int,
        device_is_cuda: bool,
    ) -> None:
        global_batch_size = config.train.global_batch_size
        sequence_mode = config.data.sequence_mode
        if global_batch_size % dp_size:
            raise UserError(
                f"train.global_batch_size={global_batch_size} is not divisible by the "
                f"data-parallel size {dp_size}; choose a multiple of {dp_size}"
            )
        started_at = time.perf_counter()
        self._rows = rows_of_corpus(corpus, config)
        elapsed_s = time.perf_counter() - started_at
        self._order = SampleOrder(corpus.weights, self._rows.rows_of_sources, config.run.seed)
        self._corpus = corpus
        self._global_batch_size = global_batch_size
        self._micro_batch_size = config.train.micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._first_sample = consumed_samples  # of the next step
        self._multiple_of = tp_size
        self._deal: Deal = assign_by_length if sequence_mode == "pad" else assign_in_order
        # In mode pad a row is of one document anyway.
        self._keep_documents_apart = config.data.inter_document_masking and sequence_mode == "pack"
        self._pin_memory = device_is_cuda
        if logger.isEnabledFor(logging.INFO):
            _log_padding(self._rows, self._order, config, dp_size, tp_size, elapsed_s)
        # Holds batches, or the exception that ended the thread.
        self._queue: queue.Queue[StepBatch | Exception] = queue.Queue(_STEPS_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="batch-loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "BatchLoader":
        return self

    def __next__(self) -> StepBatch:
        """Returns the next step's batch; raises what the thread raised, and ends after `close`."""
        if self._closed.is_set():
            raise StopIteration
        with record_function(WAITING_FOR_DATA):
            item = self._queue.get()
        if isinstance(item, Exception):
            self._closed.set()
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; what it has prepared is dropped."""
        self._closed.set()
        self._thread.join()

    def _produce(self) -> None:
        try:
            while not self._closed.is_set():
                batch = self._make_step()
                self._put(batch)
                self._first_sample += self._global_batch_size
        except Exception as error:  # whatever it is, it is raised again in `__next__`
            self._put(error)

    def _put(self, item: StepBatch | Exception) -> None:
        """Waits for room in the queue, and gives up when the loader is closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_STOP_CHECK_INTERVAL_S)
            except queue.Full:
                continue
            return

    def _make_step(self) -> StepBatch:
        first = self._first_sample
        rows = self._order.rows(first, self._global_batch_size)
        micro_batches = []
        lengths = self._rows.lengths(rows)
        for part in self._deal(lengths, self._micro_batch_size, self._dp_rank, self._dp_size):
            micro_batch = make_micro_batch(
                self._corpus.train,
                self._rows.spans(rows[part]),
                first + part,
                self._multiple_of,
                self._corpus.tokenizer.eos_id,
                keep_documents_apart=self._keep_documents_apart,
            )
            micro_batches.append(micro_batch.pin_memory() if self._pin_memory else micro_batch)
        return StepBatch(micro_batches, sum(batch.num_targets for batch in micro_batches))


def rows_of_corpus(corpus: Corpus, config: Config) -> JoinedRows:
    """Returns the rows of training; a ValueError names a source that has none."""
    data, seq_length = config.data, config.model.seq_length
    parts = []
    for (key, source), tokens in zip(data.mixture.items(), corpus.train.parts, strict=True):
        rows = training_rows(tokens, seq_length, data.sequence_mode, data.packing)
        if not len(rows):
            raise UserError(
                f"the training documents of {key}.source={source.source} give no row of "
                f"model.seq_length={seq_length} tokens; use more text or a smaller model.seq_length"
            )
        parts.append(rows)
    return JoinedRows(parts, [tokens.num_tokens for tokens in corpus.train.parts])


def _log_padding(
    rows: Rows, order: SampleOrder, config: Config, dp_size: int, tp_size: int, elapsed_s: float
) -> None:
    """Says how full rows and micro-batches are, where that is in question."""
    batch_size = config.train.global_batch_size
    num_rows = max(batch_size, min(_ROWS_OF_ESTIMATE, len(rows)) // batch_size * batch_size)
    lengths = rows.lengths(order.rows(0, num_rows))
    layout = (batch_size, config.train.micro_batch_size, dp_size, tp_size)
    in_order = 100 * padding_fraction(lengths, assign_in_order, *layout)
    if config.data.sequence_mode == "pad":
        by_length = 100 * padding_fraction(lengths, assign_by_length, *layout)
        logger.info(
            "padding: about %.2f%% of slots; without grouping rows by length, %.2f%%",
            by_length,
            in_order,
        )
    elif config.data.packing == "best_fit":
        logger.info(
            "padding: about %.2f%% of slots, in %s rows packed by best fit in %.1f s",
            in_order,
            f"{len(rows):,}",
            elapsed_s,
        )
