"""Batches for training, made ahead of time by a background thread.

The batch of step k of a run is samples [k B, k B + B) with B = global_batch_size, whatever the
layout; a data-parallel rank takes its contiguous share, in micro-batches that follow each other.
Ranks of one tensor-parallel group construct the same loader and get equal batches.
"""

import queue
import threading
from dataclasses import dataclass

import numpy as np

from configs.schema import Config
from data.prepare import Corpus
from data.rows import MicroBatch, make_micro_batch, training_rows
from data.sampler import sample_rows

_STEPS_AHEAD = 2
_STOP_CHECK_INTERVAL_S = 0.1


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
        global_batch_size, seq_length = config.train.global_batch_size, config.model.seq_length
        sequence_mode = config.data.sequence_mode
        if global_batch_size % dp_size:
            raise ValueError(
                f"train.global_batch_size={global_batch_size} is not divisible by the "
                f"data-parallel size {dp_size}; choose a multiple of {dp_size}"
            )
        self._rows = training_rows(corpus.train, seq_length, sequence_mode)
        if not len(self._rows):
            raise ValueError(
                f"the training documents give no row of model.seq_length={seq_length} tokens; use "
                "more text or a smaller model.seq_length"
            )
        self._corpus = corpus
        self._seed = config.run.seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = config.train.micro_batch_size
        self._share = global_batch_size // dp_size
        self._next_sample = consumed_samples + dp_rank * self._share
        self._multiple_of = tp_size
        # In mode pad a row is of one document anyway.
        self._keep_documents_apart = config.data.inter_document_masking and sequence_mode == "pack"
        self._pin_memory = device_is_cuda
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
                self._next_sample += self._global_batch_size
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
        first = self._next_sample
        samples = np.arange(first, first + self._share, dtype=np.int64)
        rows = sample_rows(samples, len(self._rows), self._seed)
        micro_batches = []
        for start in range(0, self._share, self._micro_batch_size):
            part = slice(start, start + self._micro_batch_size)
            micro_batch = make_micro_batch(
                self._corpus.train,
                self._rows.spans(rows[part]),
                samples[part],
                self._multiple_of,
                self._corpus.tokenizer.eos_id,
                keep_documents_apart=self._keep_documents_apart,
            )
            micro_batches.append(micro_batch.pin_memory() if self._pin_memory else micro_batch)
        return StepBatch(micro_batches, sum(batch.num_targets for batch in micro_batches))
