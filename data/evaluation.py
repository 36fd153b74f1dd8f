"""Rows of whole documents to be scored, so that bits per byte are exact.

[Note: rolling windows]
A document starts with bos, which is not scored; every token of its text is scored once, and eos is
not. The first window reads s tokens and scores the s tokens that follow bos. Each later window
scores the next `stride` tokens, or those that are left, and reads the s tokens before its last
one. With stride = s only the last window reads tokens twice. A document of at most s tokens is one
shorter window. These are the windows of lm-evaluation-harness's `get_rolling_token_windows` with
stride = max_seq_len - context_len + 1.

The nats are divided by the UTF-8 bytes of the same documents' text.

Of pairs and conversations (data/corpus/segments.py) the targets of training are scored: one row
each, truncated to s tokens, and eos after a target is a target. Their bytes are those of the
targets' text, so bits per byte includes the bits that end the targets.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Unpack

import numpy as np

from data.cached_corpus import Corpus, lossy_warning, unknown_warning
from data.packing import Int64Array
from data.rows import IGNORED_TARGET, MicroBatch, Spans, Truncation, make_micro_batch
from data.token_file import TokenArray
from ops.balance import CPRank, width_multiple


class EvaluationSet:
    """The rows that one data-parallel rank scores, and the totals of all ranks.

    Whole documents of at most `max_sequences` rows (None: all) are chosen. Each source of a mixture
    gets a share of the rows by its weight. A window scores `stride` tokens (None: `seq_length`);
    see [Note: rolling windows]. The choice depends on neither layout nor stride. All ranks get
    equally many batches, filled up with rows whose targets are all ignored.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_length: int,
        max_sequences: int | None,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        tp_size: int,
        stride: int | None = None,
        **cp: Unpack[CPRank],
    ) -> None:
        stride = stride or seq_length
        file = corpus.validation
        self._truncation = truncation = Truncation(file, seq_length)
        # In a text, neither bos nor eos is scored.
        num_tokens = truncation.num_inputs - truncation.is_text

        def num_windows(step: int) -> Int64Array:
            after_first = -(-np.maximum(0, num_tokens - seq_length) // step)
            return np.where(num_tokens > 0, 1 + after_first, 0)

        chosen = _choose_documents(corpus, num_windows(seq_length), max_sequences)
        counts = num_windows(stride)[chosen]
        document = np.repeat(chosen, counts)  # of each window
        number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.minimum(seq_length + number * stride, num_tokens[document])
        scored = ends - np.where(number == 0, 0, seq_length + (number - 1) * stride)
        lengths = np.minimum(seq_length, ends)
        starts = file.document_offsets[document] + ends - lengths

        windows = np.stack([starts, lengths, scored, np.arange(len(document))])
        self._windows = deal_rows(windows, micro_batch_size, dp_rank, dp_size)
        self.num_batches = self._windows.shape[1]  # of each rank
        self._corpus, self._cp = corpus, cp
        self._multiple_of = width_multiple(cp.get("cp_size", 1), tp_size)
        self.num_documents = len(chosen)
        self.num_bytes = int(file.document_bytes[chosen].sum())  # UTF-8 bytes of the text
        self.num_targets = int(scored.sum())
        if file.targets is not None:
            ends = file.document_offsets[document] + 1 + ends
            self.num_targets = int(file.targets.count(ends - scored, ends).sum())
            for number in chosen[truncation.is_cut[chosen]].tolist():
                text = corpus.tokenizer.decode(self._scored_tokens(number).tolist())
                self.num_bytes += len(text.encode()) - int(file.document_bytes[number])
        self.num_unknown = 0  # targets for text unknown to the tokenizer
        if corpus.summary.get("validation", {}).get("unknown"):  # hardly ever
            unk_id = corpus.tokenizer.unk_id
            self.num_unknown = sum(
                int(np.count_nonzero(self._scored_tokens(number) == unk_id))
                for number in chosen.tolist()
            )

    def _scored_tokens(self, document: int) -> TokenArray:
        """Return the targets of a document without eos."""
        file = self._corpus.validation
        start = int(file.document_offsets[document]) + 1
        stop = start + int(self._truncation.num_inputs[document])
        tokens = file.span(start, stop)
        is_scored = tokens != self._corpus.tokenizer.eos_id
        if file.targets is not None:
            is_scored &= file.targets.contains(np.arange(start, stop))
        return tokens[is_scored]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons why the score looks better than it is, or is of less than all targets."""
        found = []
        if self.num_unknown:
            found.append(unknown_warning(self.num_unknown, self.num_targets, "scored tokens"))
        split = self._corpus.summary.get("validation", {})
        if split.get("lossy"):
            found.append(lossy_warning(split, "held-out documents"))
        if lost := self._truncation.describe():
            found.append(f"of the held-out documents, {lost}")
        return tuple(found)

    @property
    def batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches, built one at a time."""
        for starts, lengths, scored, sample_indices in zip(*self._windows, strict=True):
            rows = np.arange(len(starts))
            batch = make_micro_batch(
                self._corpus.validation,
                Spans(starts, lengths, rows, np.zeros_like(rows)),
                sample_indices,
                self._multiple_of,
                self._corpus.tokenizer.eos_id,
            )
            targets = batch.targets.numpy()
            # The first targets are scored by the window before.
            targets[np.arange(targets.shape[1]) < (lengths - scored)[:, None]] = IGNORED_TARGET
            batch = replace(batch, num_targets=int((targets != IGNORED_TARGET).sum()))
            yield batch.of_cp_rank(**self._cp)


def deal_rows(rows: Int64Array, micro_batch_size: int, dp_rank: int, dp_size: int) -> Int64Array:
    """Return one rank's rows `[k, num_batches, b]` of all `[k, n]`, the last ones filled with 0."""
    missing = -rows.shape[1] % (micro_batch_size * dp_size)
    padded = np.pad(rows, ((0, 0), (0, missing)))
    return padded.reshape(len(rows), -1, dp_size, micro_batch_size)[:, :, dp_rank]


def _choose_documents(corpus: Corpus, num_rows: Int64Array, max_rows: int | None) -> Int64Array:
    """Return the first documents of each source that fit in its share of the rows.

    Documents longer than the share are skipped; if all are, the shortest is taken. At least one
    document remains, so that there is something to evaluate.
    """
    if max_rows is None:
        return np.arange(len(num_rows))
    weights = corpus.validation_weights or corpus.weights
    chosen, first = [np.empty(0, dtype=np.int64)], 0
    for part, weight in zip(corpus.validation.parts, weights, strict=True):
        documents = np.arange(first, first + part.num_documents)
        first += part.num_documents
        share = max(1, int(max_rows * weight / sum(weights)))
        fitting = documents[num_rows[documents] <= share]
        if len(fitting):
            chosen.append(fitting[np.cumsum(num_rows[fitting]) <= share])
        elif len(documents):
            chosen.append(documents[[np.argmin(num_rows[documents])]])
    together = np.concatenate(chosen)
    num_fitting = int((np.cumsum(num_rows[together]) <= max_rows).sum())
    return together[: max(1, num_fitting)]
