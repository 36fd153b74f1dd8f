"""Rows of documents to be scored, so that bits per byte are exact.

[Note: rolling windows]
A document is read from its bos, which is not scored, to the token before its eos; every token of
its text is scored once. The first window reads s tokens, bos among them, and scores all s that
follow them. Each window after it scores the next `stride` tokens, or those that are left, and reads
the s tokens before the last of them: with stride = s only the last window reads some tokens that
were read before. A document of no more than s tokens is one shorter window. These are the windows
of lm-evaluation-harness's `loglikelihood_rolling` (its `get_rolling_token_windows`, with stride =
max_seq_len - context_len + 1).

Documents are whole, in the order of the file, which for held-out documents is that of their hashes:
the bytes that the nats are divided by are those of the documents' text.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.corpus.prepare import Corpus
from data.corpus.report import lossy_warning, unknown_warning
from data.packing import Int64Array
from data.rows import IGNORED_TARGET, MicroBatch, Spans, make_micro_batch
from data.token_file import Tokens


class _Windows(NamedTuple):
    """One element for each window."""

    starts: Int64Array  # in the token stream
    lengths: Int64Array  # inputs; 0: filler, a row that scores nothing
    scored: Int64Array  # the last so many targets


@dataclass(frozen=True)
class EvaluationSet:
    """The rows that one data-parallel rank scores, and what all ranks together cover."""

    num_documents: int  # of all ranks together, like the counts below
    num_bytes: int  # UTF-8 bytes of the documents' text
    num_targets: int
    num_unknown: int  # of the targets, those that stand for text that the tokenizer does not know
    num_batches: int  # of each rank: the same number on all
    _corpus: Corpus = field(repr=False)
    _windows: _Windows = field(repr=False)  # [num_batches, b] each, this rank's
    _numbers: Int64Array = field(repr=False)
    _multiple_of: int = field(repr=False)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the targets do not tell of the text, which makes its score look better."""
        found = []
        if self.num_unknown:
            found.append(unknown_warning(self.num_unknown, self.num_targets, "scored tokens"))
        split = self._corpus.summary.get("validation", {})
        if split.get("lossy"):
            found.append(lossy_warning(split, "held-out documents"))
        return tuple(found)

    @property
    def batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches, made one by one."""
        for starts, lengths, scored, numbers in zip(*self._windows, self._numbers, strict=True):
            batch = make_micro_batch(
                self._corpus.validation,
                Spans.of_rows(starts, lengths),
                numbers,
                self._multiple_of,
                self._corpus.tokenizer.eos_id,
            )
            targets = batch.targets.numpy()
            # Scored by another window: only read again.
            targets[np.arange(targets.shape[1]) < (lengths - scored)[:, None]] = IGNORED_TARGET
            yield dataclasses.replace(batch, num_targets=int(scored.sum()))


def evaluation_batches(
    corpus: Corpus,
    *,
    seq_length: int,
    max_sequences: int | None,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    tp_size: int,
    stride: int | None = None,
) -> EvaluationSet:
    """Chooses whole documents of at most `max_sequences` rows (null: all) and deals their rows to
    ranks. A window scores `stride` tokens (null: `seq_length`), see [Note: rolling windows].

    Of a mixture each source has a share of the rows by its weight. Which documents are chosen does
    not depend on the layout. Ranks get the same number of batches; where rows run out, batches are
    filled with rows whose targets are all ignored.
    """
    stride = stride or seq_length
    file = corpus.validation
    num_tokens = np.diff(file.document_offsets) - 2  # of text, without bos and eos
    beyond_first = np.maximum(0, num_tokens - seq_length)

    def num_windows(step: int) -> Int64Array:
        return np.where(num_tokens > 0, 1 - -beyond_first // step, 0)

    # The same documents whatever the stride, so that scores can be compared.
    documents = _choose_from_each(corpus, num_windows(seq_length), max_sequences)
    windows = _windows_of(file, documents, num_windows(stride), seq_length, stride)
    batch_rows = micro_batch_size * dp_size
    num_rows = len(windows.starts)
    num_batches = -(-num_rows // batch_rows)

    def dealt(values: Int64Array) -> Int64Array:
        filled = np.zeros(num_batches * batch_rows, dtype=np.int64)
        filled[: len(values)] = values
        return filled.reshape(num_batches, dp_size, micro_batch_size)[:, dp_rank]

    return EvaluationSet(
        num_documents=len(documents),
        num_bytes=int(file.document_bytes[documents].sum()),
        num_targets=int(windows.scored.sum()),
        num_unknown=_count_unknown(corpus, documents),
        num_batches=num_batches,
        _corpus=corpus,
        _windows=_Windows(*map(dealt, windows)),
        _numbers=dealt(np.arange(num_rows, dtype=np.int64)),
        _multiple_of=tp_size,
    )


def _count_unknown(corpus: Corpus, documents: Int64Array) -> int:
    if not corpus.summary.get("validation", {}).get("unknown"):  # nearly always
        return 0
    file, unk_id = corpus.validation, corpus.tokenizer.unk_id
    starts, ends = file.document_offsets[documents] + 1, file.document_offsets[documents + 1] - 1
    spans = (file.span(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True))
    return sum(int(np.count_nonzero(span == unk_id)) for span in spans)


def _windows_of(
    file: Tokens,
    documents: Int64Array,
    rows_per_document: Int64Array,
    seq_length: int,
    stride: int,
) -> _Windows:
    """The windows of documents, one after the other."""
    num_rows = rows_per_document[documents]
    document = np.repeat(documents, num_rows)
    # The window's number in its document.
    number = np.arange(len(document)) - np.repeat(np.cumsum(num_rows) - num_rows, num_rows)
    num_tokens = file.document_offsets[document + 1] - file.document_offsets[document] - 2
    ends = np.minimum(seq_length + number * stride, num_tokens)  # tokens scored by its end
    before = np.where(number == 0, 0, seq_length + (number - 1) * stride)
    # The inputs of the last scored token: as many as fit, and they begin with bos at 0.
    starts = np.maximum(0, ends - seq_length)
    return _Windows(file.document_offsets[document] + starts, ends - starts, ends - before)


def _choose_from_each(
    corpus: Corpus, rows_per_document: Int64Array, max_sequences: int | None
) -> Int64Array:
    """Returns the documents chosen from each source, together of at most so many rows.

    There is one document at least, though it be longer.
    """
    weights = corpus.validation_weights or corpus.weights
    chosen, first, total = [np.empty(0, np.int64)], 0, sum(weights)
    for part, weight in zip(corpus.validation.parts, weights, strict=True):
        share = None if max_sequences is None else max(1, int(max_sequences * weight / total))
        mine = rows_per_document[first : first + part.num_documents]
        chosen.append(first + _choose_documents(mine, share))
        first += part.num_documents
    documents = np.concatenate(chosen)
    if max_sequences is None or not len(documents):
        return documents
    fitting = np.cumsum(rows_per_document[documents]) <= max_sequences
    return documents[: max(1, int(fitting.sum()))]


def _choose_documents(rows_per_document: Int64Array, max_sequences: int | None) -> Int64Array:
    """Returns the first documents that fit together, passing over those too long by themselves.

    If every document is too long, the shortest is taken, so that there is something to evaluate.
    """
    documents = np.arange(len(rows_per_document))
    if max_sequences is None or not len(documents):
        return documents
    fitting = documents[rows_per_document <= max_sequences]
    if not len(fitting):
        return np.array([np.argmin(rows_per_document)])
    return fitting[np.cumsum(rows_per_document[fitting]) <= max_sequences]
