"""Rows and micro-batches against literal implementations of the rules."""

import numpy as np
import pytest
import torch

from data import TokenFile
from data.rows import IGNORED_TARGET, MicroBatch, Rows, count_targets, make_micro_batch
from tests.data_corpora import token_file
from tests.reference import document_numbers

PADDING = 2


def literal_pack(file: TokenFile, seq_length: int) -> list[tuple[list[int], list[int]]]:
    """Return (inputs, targets) of the rows: the stream cut every seq_length tokens."""
    stream = file.tokens.tolist()
    rows = []
    position = 0
    while position + seq_length < len(stream):
        rows.append(
            (
                stream[position : position + seq_length],
                stream[position + 1 : position + seq_length + 1],
            )
        )
        position += seq_length
    return rows


def literal_pad(file: TokenFile, seq_length: int) -> list[tuple[list[int], list[int]]]:
    """Return (inputs, targets) of the rows: each document by itself, cut every seq_length."""
    rows = []
    for number in range(file.num_documents):
        start, end = file.document_offsets[number : number + 2]
        document = file.tokens[start:end].tolist()
        inputs, targets = document[:-1], document[1:]
        while inputs:
            rows.append((inputs[:seq_length], targets[:seq_length]))
            inputs, targets = inputs[seq_length:], targets[seq_length:]
    return rows


def all_rows_in_one(file: TokenFile, rows: Rows, multiple_of: int) -> MicroBatch:
    """Return a micro-batch of all rows."""
    numbers = np.arange(len(rows))
    return make_micro_batch(file, rows.spans(numbers), numbers, multiple_of, PADDING)


@pytest.mark.parametrize("multiple_of", [1, 2, 3])
@pytest.mark.parametrize("seq_length", [1, 2, 3, 5, 7, 8, 200])
@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_rows_equal_the_literal_ones(mode: str, seq_length: int, multiple_of: int) -> None:
    """Tokens, targets, positions and counts follow the rules, with padding to a multiple."""
    file = token_file([9, 2, 1, 0, 17, 3, 8, 0, 1])
    literal = (literal_pack if mode == "pack" else literal_pad)(file, seq_length)
    rows = Rows(file, seq_length, mode)
    assert len(rows) == len(literal)
    if not literal:
        return

    batch = all_rows_in_one(file, rows, multiple_of)

    width = max(len(inputs) for inputs, _ in literal)
    width = (width + multiple_of - 1) // multiple_of * multiple_of
    for number, (inputs, targets) in enumerate(literal):
        padding = width - len(inputs)
        assert batch.tokens[number].tolist() == inputs + [PADDING] * padding
        assert batch.targets[number].tolist() == targets + [IGNORED_TARGET] * padding
        assert batch.positions[number].tolist() == [*range(len(inputs)), *[0] * padding]
    assert batch.num_targets == sum(len(targets) for _, targets in literal)
    spans = rows.spans(np.arange(len(rows)))
    assert batch.num_targets == count_targets(file, spans, keep_documents_apart=False)
    assert batch.num_targets == int((batch.targets != IGNORED_TARGET).sum())
    assert batch.sum_of_lengths == sum(len(targets) ** 2 for _, targets in literal)
    assert {t.dtype for t in (batch.tokens, batch.targets, batch.positions)} == {torch.int64}


@pytest.mark.parametrize("multiple_of", [1, 3])
@pytest.mark.parametrize("seq_length", [1, 2, 3, 5, 8, 40])
def test_documents_of_a_packed_row_are_kept_apart(seq_length: int, multiple_of: int) -> None:
    """Positions restart at each document, and no target is the next document's bos."""
    file = token_file([9, 2, 1, 0, 17, 3, 8, 0, 1])
    rows = Rows(file, seq_length, "pack")
    numbers = np.arange(len(rows))
    batch = make_micro_batch(
        file, rows.spans(numbers), numbers, multiple_of, PADDING, keep_documents_apart=True
    )
    together = make_micro_batch(file, rows.spans(numbers), numbers, multiple_of, PADDING)
    assert torch.equal(batch.tokens, together.tokens)
    begins: list[list[int]] = []
    owner = [n for n in range(file.num_documents) for _ in range(*file.document_offsets[n : n + 2])]
    for row in range(len(rows)):
        place, first = row * seq_length, row * seq_length
        begins.append([0])
        for column in range(batch.tokens.shape[1]):
            if column >= seq_length:
                begins[row] += [column] if column == seq_length else []
                assert batch.positions[row, column] == 0
                assert batch.targets[row, column] == IGNORED_TARGET
                continue
            if owner[place] != owner[first]:
                first = place
                begins[row].append(column)
            assert batch.positions[row, column] == place - first
            is_last = owner[place + 1] != owner[place]
            expected = IGNORED_TARGET if is_last else file.tokens[place + 1]
            assert batch.targets[row, column] == expected
            place += 1
    assert batch.documents == begins
    is_target = batch.targets != IGNORED_TARGET
    assert batch.num_targets == int(is_target.sum())
    numbers = document_numbers(begins, batch.tokens.shape[1])
    parts = numbers + 100 * torch.arange(len(rows))[:, None]
    counts = parts[is_target].unique(return_counts=True)[1]
    assert batch.sum_of_lengths == int(counts.square().sum())


def test_width_is_that_of_the_longest_row() -> None:
    """A micro-batch of short rows is narrow, whatever seq_length is."""
    file = token_file([5, 90, 4])
    rows = Rows(file, 64, "pad")
    assert len(rows) == 4
    spans = rows.spans(np.array([0, 3]))
    batch = make_micro_batch(file, spans, np.array([0, 3]), 3, PADDING)
    assert batch.tokens.shape == (2, 6)  # 4 and 3 inputs, rounded up to a multiple of 3


def test_pad_scores_every_token_but_bos_once() -> None:
    """In mode pad the targets are all tokens of each document except its first."""
    file = token_file([9, 2, 30, 3])
    batch = all_rows_in_one(file, Rows(file, 7, "pad"), 1)
    scored = batch.targets[batch.targets != IGNORED_TARGET].tolist()
    starts = set(file.document_offsets[:-1].tolist())
    assert scored == [t for i, t in enumerate(file.tokens.tolist()) if i not in starts]


def test_offsets_beyond_2_to_the_31_do_not_overflow() -> None:
    """The rows of 3 billion tokens are found without listing them."""
    tokens = np.broadcast_to(np.uint16(5), (3_000_000_001,))
    offsets = np.array([0, 3_000_000_001])
    file = TokenFile(tokens, offsets, np.array([1]))
    for mode in ("pack", "pad"):
        rows = Rows(file, 1000, mode)
        spans = rows.spans(np.array([len(rows) - 1]))
        assert (len(rows), spans.starts[0], spans.lengths[0]) == (3_000_000, 2_999_999_000, 1000)
