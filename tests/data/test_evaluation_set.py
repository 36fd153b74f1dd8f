"""Evaluation rows: exact bytes, each token scored once, equal work on every rank."""

import itertools

import pytest
from lm_eval.utils import get_rolling_token_windows

from data.evaluation import EvaluationSet
from data.rows import IGNORED_TARGET
from tests.data_corpora import corpus_of_lengths, token_file

LENGTHS = (12, 3, 40, 9, 100, 5, 3, 22)


def evaluation_set(
    max_sequences: int | None,
    dp_rank: int = 0,
    dp_size: int = 1,
    micro_batch_size: int = 3,
    lengths: tuple[int, ...] = LENGTHS,
    stride: int | None = None,
) -> EvaluationSet:
    """Return the set of one rank, with windows of 8 tokens and tp = 2."""
    return EvaluationSet(
        corpus_of_lengths([10], lengths),
        seq_length=8,
        stride=stride,
        max_sequences=max_sequences,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        tp_size=2,
    )


def scored_tokens(sets: list[EvaluationSet]) -> list[int]:
    """Return all scored targets of all ranks, sorted."""
    return sorted(
        token
        for each in sets
        for batch in each.batches
        for token in batch.targets[batch.targets != IGNORED_TARGET].tolist()
    )


def text_tokens(documents: list[int]) -> list[int]:
    """Return every token of the documents except bos and eos, sorted."""
    file = token_file(LENGTHS)
    offsets = file.document_offsets
    return sorted(
        token for i in documents for token in file.span(offsets[i] + 1, offsets[i + 1] - 1).tolist()
    )


def test_every_text_token_is_scored_once() -> None:
    """bos and eos are not scored, and all bytes of the texts are counted."""
    everything = evaluation_set(None)
    assert scored_tokens([everything]) == text_tokens(list(range(len(LENGTHS))))
    assert everything.num_bytes == sum(3 * length + 1 for length in LENGTHS)
    assert everything.num_documents == len(LENGTHS)
    assert everything.num_targets == sum(length - 2 for length in LENGTHS)


def test_last_window_overlaps() -> None:
    """20 tokens give windows that score 8, 8 and 4; the last one reads 4 tokens again."""
    (batch,) = evaluation_set(None, lengths=(22,)).batches
    assert batch.tokens[:, 0].tolist() == [1, 17, 21]
    assert batch.targets[:, 0].tolist() == [10, 18, IGNORED_TARGET]
    assert [int((row != IGNORED_TARGET).sum()) for row in batch.targets] == [8, 8, 4]
    assert batch.num_targets == 20


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
def test_windows_equal_those_of_lm_evaluation_harness(stride: int | None) -> None:
    """Both read and score the same tokens, window by window."""
    file, seq_length = token_file(LENGTHS), 8
    expected = []
    for start, end in itertools.pairwise(file.document_offsets.tolist()):
        bos, *text = file.span(start, end - 1).tolist()
        context_len = seq_length - (stride or seq_length) + 1
        windows = get_rolling_token_windows(text, bos, seq_length, context_len)
        expected += [(inputs, targets) for inputs, targets in windows if targets]
    found = []
    for batch in evaluation_set(None, stride=stride).batches:
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            scored = targets != IGNORED_TARGET
            if scored.any():
                length = int(scored.nonzero().max()) + 1
                found.append((tokens[:length].tolist(), targets[scored].tolist()))
    assert found == expected


def test_every_token_is_scored_once_with_any_stride() -> None:
    """The stride changes neither the documents nor the scored tokens."""
    for stride in (1, 2, 5, 8):
        chosen = evaluation_set(None, stride=stride)
        assert scored_tokens([chosen]) == text_tokens(list(range(len(LENGTHS))))
        assert chosen.num_targets == sum(length - 2 for length in LENGTHS)


@pytest.mark.parametrize(
    ("max_sequences", "documents"),
    [
        (1, [1]),  # documents of 2 or more rows are longer than the limit
        (2, [0]),  # 2 rows, so the next one does not fit
        (3, [0, 1]),
        (8, [0, 1, 2]),  # 2 + 1 + 5 rows
        (10, [0, 1, 2, 3, 5]),  # the document of 13 rows is skipped
        (12, [0, 1, 2, 3, 5, 6]),  # the last one, of 3 rows, does not fit
        (100, list(range(8))),
    ],
)
def test_takes_whole_documents_up_to_max_sequences(
    max_sequences: int, documents: list[int]
) -> None:
    """Documents are taken in file order; those longer than the limit are skipped."""
    chosen = evaluation_set(max_sequences)
    assert scored_tokens([chosen]) == text_tokens(documents)
    assert chosen.num_bytes == sum(3 * LENGTHS[i] + 1 for i in documents)


def test_takes_the_shortest_document_if_all_are_too_long() -> None:
    """There is always something to evaluate."""
    chosen = evaluation_set(2, lengths=(90, 40, 60))
    assert (chosen.num_documents, chosen.num_targets) == (1, 38)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 7])
def test_ranks_share_the_rows_evenly(dp_size: int, micro_batch_size: int) -> None:
    """All ranks score the tokens of a single rank, in equally many batches of equal size."""
    ranks = [evaluation_set(12, rank, dp_size, micro_batch_size) for rank in range(dp_size)]
    assert scored_tokens(ranks) == scored_tokens([evaluation_set(12)])
    assert len({each.num_batches for each in ranks}) == 1
    for each in ranks:
        batches = list(each.batches)
        assert len(batches) == each.num_batches
        assert all(len(batch.tokens) == micro_batch_size for batch in batches)
        assert all(batch.tokens.shape[1] % 2 == 0 for batch in batches)
        assert (each.num_bytes, each.num_targets) == (ranks[0].num_bytes, ranks[0].num_targets)


def test_batches_can_be_read_again() -> None:
    """Each evaluation of a run reads the same set again."""
    chosen = evaluation_set(12)
    assert scored_tokens([chosen]) == scored_tokens([chosen])


def test_no_validation_documents_give_an_empty_set() -> None:
    """There are no batches and no totals."""
    empty = evaluation_set(12, lengths=())
    assert (empty.num_batches, empty.num_documents, empty.num_bytes) == (0, 0, 0)
    assert list(empty.batches) == []


def test_the_stride_does_not_change_the_choice_of_documents() -> None:
    """Scores with different strides are of the same text, even if max_sequences is small."""
    corpus = corpus_of_lengths([10], LENGTHS)
    sets = [
        EvaluationSet(
            corpus,
            seq_length=8,
            max_sequences=6,
            micro_batch_size=3,
            dp_rank=0,
            dp_size=1,
            tp_size=1,
            stride=stride,
        )
        for stride in (None, 8, 2, 1)
    ]
    assert len({(each.num_documents, each.num_bytes, each.num_targets) for each in sets}) == 1
    assert 1 < sets[0].num_documents < len(LENGTHS)
