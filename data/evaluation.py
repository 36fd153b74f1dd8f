"""Rows of held-out documents, so that bits per byte are exact.

A document is read from its bos, which is not scored, to the token before its eos; windows of
seq_length follow each other without overlap. Documents are whole, in the order of the file, which
is that of their hashes: the bytes that the nats are divided by are those of the documents' text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data.packing import Int64Array
from data.prepare import Corpus
from data.rows import MicroBatch, PaddedRows, Spans, make_micro_batch


@dataclass(frozen=True)
class EvaluationSet:
    """The rows that one data-parallel rank scores, and what all ranks together cover."""

    num_documents: int  # of all ranks together, like the counts below
    num_bytes: int  # UTF-8 bytes of the documents' text
    num_targets: int
    num_batches: int  # of each rank: the same number on all
    _corpus: Corpus = field(repr=False)
    _starts: Int64Array = field(repr=False)  # [num_batches, b], this rank's spans; length 0: no row
    _lengths: Int64Array = field(repr=False)
    _numbers: Int64Array = field(repr=False)
    _multiple_of: int = field(repr=False)

    @property
    def batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches, made one by one."""
        for starts, lengths, numbers in zip(
            self._starts, self._lengths, self._numbers, strict=True
        ):
            yield make_micro_batch(
                self._corpus.validation,
                Spans.of_rows(starts, lengths),
                numbers,
                self._multiple_of,
                self._corpus.tokenizer.eos_id,
            )


def evaluation_batches(
    corpus: Corpus,
    *,
    seq_length: int,
    max_sequences: int | None,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    tp_size: int,
) -> EvaluationSet:
    """Chooses whole documents of at most `max_sequences` rows (null: all) and deals their rows to
    ranks.

    Of a mixture each source has a share of the rows by its weight. Which documents are chosen does
    not depend on the layout. Ranks get the same number of batches; where rows run out, batches are
    filled with rows whose targets are all ignored.
    """
    rows = PaddedRows(corpus.validation, seq_length, trailing_tokens=1)
    documents = _choose_from_each(corpus, rows.rows_per_document, max_sequences)
    numbers = np.concatenate([np.empty(0, np.int64), *(rows.rows_of(int(i)) for i in documents)])
    spans = rows.spans(numbers)
    batch_rows = micro_batch_size * dp_size
    num_batches = -(-len(numbers) // batch_rows)

    def dealt(values: Int64Array) -> Int64Array:
        filled = np.zeros(num_batches * batch_rows, dtype=np.int64)
        filled[: len(values)] = values
        return filled.reshape(num_batches, dp_size, micro_batch_size)[:, dp_rank]

    return EvaluationSet(
        num_documents=len(documents),
        num_bytes=int(corpus.validation.document_bytes[documents].sum()),
        num_targets=int(spans.lengths.sum()),
        num_batches=num_batches,
        _corpus=corpus,
        _starts=dealt(spans.starts),
        _lengths=dealt(spans.lengths),
        _numbers=dealt(np.arange(len(numbers), dtype=np.int64)),
        _multiple_of=tp_size,
    )


def _choose_from_each(
    corpus: Corpus, rows_per_document: Int64Array, max_sequences: int | None
) -> Int64Array:
    """Returns the documents chosen from each source, together of at most so many rows.

    There is one document at least, though it be longer.
    """
    chosen, first, total = [np.empty(0, np.int64)], 0, sum(corpus.weights)
    for part, weight in zip(corpus.validation.parts, corpus.weights, strict=True):
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
