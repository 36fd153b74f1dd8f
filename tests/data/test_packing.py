"""Best-fit packing and rows of similar length, against literal implementations of the rules."""

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.testing import assert_close

from data import TokenFile
from data.packing import assign_by_length, assign_in_order, best_fit
from data.rows import IGNORED_TARGET, MicroBatch, Rows, Spans, make_micro_batch
from docs.row_waste import Cuts, cuts, padding_fraction
from parallel import Mesh, local_gradients, local_shards, sum_partial_gradients
from tests.data_corpora import token_file
from tests.distributed import ONE_RANK, Layout, distributed
from tests.model.test_gpt import OPTIONS, TINY, VOCAB, dense_weights, tiny_model
from tests.reference import reference_losses

Int64Array = npt.NDArray[np.int64]
# The distribution of lengths, the length of a row, and the number of pieces.
SETS = [
    ("uniform", 64, 300),
    ("uniform", 7, 200),
    ("short", 64, 400),
    ("long", 64, 300),
    ("log-normal", 100, 400),
    ("one length", 10, 50),
    ("log-normal", 70_000, 300),
    ("uniform", 1, 5),
    ("uniform", 9, 0),
]


def random_lengths(kind: str, capacity: int, num_pieces: int, seed: int) -> Int64Array:
    """Return lengths of at least 1 and at most `capacity`, `[num_pieces]`."""
    generator = np.random.default_rng(seed)
    drawn = {
        "uniform": generator.integers(1, capacity + 1, num_pieces),
        "short": generator.integers(1, max(2, capacity // 5), num_pieces),
        "long": generator.integers(capacity // 3, capacity + 1, num_pieces),
        "log-normal": generator.lognormal(np.log(capacity / 4), 1.2, num_pieces).astype(np.int64),
        "one length": np.full(num_pieces, max(1, 3 * capacity // 10)),
    }
    return np.clip(drawn[kind], 1, capacity)


def literal_best_fit(lengths: Int64Array, capacity: int) -> list[int]:
    """Return the row of each piece: one piece at a time, looking at every row."""
    room: list[int] = []
    since: list[int] = []  # when the row got this room
    row_of_piece = [-1] * len(lengths)
    pieces = sorted(range(len(lengths)), key=lambda piece: (-lengths[piece], piece))
    for now, piece in enumerate(pieces):
        fitting = [row for row in range(len(room)) if room[row] >= lengths[piece]]
        if not fitting:
            fitting = [len(room)]
            room.append(capacity)
            since.append(now)
        row = min(fitting, key=lambda row: (room[row], since[row]))
        room[row] -= int(lengths[piece])
        since[row] = now
        row_of_piece[piece] = row
    return row_of_piece


def num_rows_of_first_fit(lengths: Int64Array, capacity: int) -> int:
    """Return the number of rows if each piece in turn goes into the first row that holds it."""
    room: list[int] = []
    for length in lengths.tolist():
        row = next((row for row, free in enumerate(room) if free >= length), len(room))
        if row == len(room):
            room.append(capacity)
        room[row] -= length
    return len(room)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("kind", "capacity", "num_pieces"), SETS)
def test_best_fit_equals_the_literal_one(
    kind: str, capacity: int, num_pieces: int, seed: int
) -> None:
    """Each piece is in the same row, no row is over-full, and first fit needs no fewer rows."""
    lengths = random_lengths(kind, capacity, num_pieces, seed)
    rows = best_fit(lengths, capacity)
    assert rows.tolist() == literal_best_fit(lengths, capacity)
    assert np.bincount(rows, weights=lengths).max(initial=0) <= capacity
    assert len(set(rows.tolist())) <= num_rows_of_first_fit(lengths, capacity)


def all_spans(rows: Rows) -> Spans:
    """Return the spans of a whole epoch."""
    return rows.spans(np.arange(len(rows), dtype=np.int64))


@pytest.mark.parametrize("seq_length", [1, 2, 7, 16, 64, 500])
@pytest.mark.parametrize("seed", range(3))
def test_every_input_is_in_one_place(seed: int, seq_length: int) -> None:
    """Every token but the last of a document is an input once; pieces of a row do not overlap.

    A document that fits in a row is one piece; a longer one is full rows and the rest.
    """
    lengths = random_lengths("log-normal", 80, 200, seed)
    lengths[::9] = 0
    lengths[5::9] = 1
    file = token_file(lengths.tolist())
    rows = Rows(file, seq_length, "pack", "best_fit")
    spans = all_spans(rows)

    times = np.zeros(len(file.tokens), dtype=np.int64)
    pieces = np.zeros(len(file.tokens), dtype=np.int64)
    filled = np.zeros(len(rows), dtype=np.int64)
    for start, length, row, column in zip(
        spans.starts, spans.lengths, spans.rows, spans.columns, strict=True
    ):
        assert column == filled[row]
        filled[row] += length
        times[start : start + length] += 1
        pieces[start] += 1
    assert filled.max() <= seq_length
    assert np.array_equal(filled, rows.lengths(np.arange(len(rows), dtype=np.int64)))
    for number in range(file.num_documents):
        document = slice(*file.document_offsets[number : number + 2].tolist())
        num_inputs = max(0, document.stop - document.start - 1)
        assert times[document].tolist() == [1] * num_inputs + [0] * min(1, lengths[number])
        assert pieces[document].sum() == -(-num_inputs // seq_length)


def test_spans_do_not_depend_on_the_other_rows() -> None:
    """Rows may be requested in any order, and repeatedly."""
    rows = Rows(token_file([9, 2, 30, 3, 5, 5, 17, 6]), 16, "pack", "best_fit")
    everything = all_spans(rows)
    wanted = np.array([3, 0, 3, 2])
    found = rows.spans(wanted)
    for place, row in enumerate(wanted):
        for name in ("starts", "lengths", "columns"):
            mine = getattr(found, name)[found.rows == place]
            assert mine.tolist() == getattr(everything, name)[everything.rows == row].tolist()


def documents_of_vocabulary(lengths: list[int]) -> TokenFile:
    """Return documents in the vocabulary of the tiny model."""
    file = token_file(lengths)
    return dataclasses.replace(file, tokens=file.tokens * 7 % VOCAB)


def packed(
    file: TokenFile, numbers: Int64Array, multiple_of: int, padding_token: int, *, apart: bool
) -> MicroBatch:
    """Return best-fit rows of the tiny model's length."""
    rows = Rows(file, TINY.seq_length, "pack", "best_fit")
    return make_micro_batch(
        file,
        rows.spans(numbers),
        numbers,
        multiple_of,
        padding_token,
        keep_documents_apart=apart,
    ).of_cp_rank()


@pytest.mark.slow
@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, sp=False))
@pytest.mark.parametrize("options", ["gpt2", "llama"])
def test_a_packed_row_equals_its_documents_alone(mesh: Mesh, options: str) -> None:
    """The loss and gradients of a row are the sums over its pieces as separate rows."""
    model = tiny_model(mesh, dataclasses.replace(TINY, hidden_dropout=0.0, **OPTIONS[options]))
    dense = dense_weights(model)
    file = documents_of_vocabulary([5, 3, 30, 2, 7, 6, 9, 4, 4])
    rows = Rows(file, TINY.seq_length, "pack", "best_fit")
    num_pieces = []
    for row in range(len(rows)):
        number = np.array([row])
        batch = packed(file, number, mesh.tp.size, 2, apart=True)
        losses = model(**batch.to(mesh.device).inputs())
        losses.objective.backward()
        expected = torch.zeros((), dtype=torch.float64)
        spans = rows.spans(number)
        for start, length in zip(spans.starts, spans.lengths, strict=True):
            tokens = torch.from_numpy(file.tokens[start : start + length + 1].astype(np.int64))
            inputs = (tokens[None, :-1], torch.arange(length)[None], tokens[None, 1:])
            expected = expected + reference_losses(dense, model.config, *inputs)[0]
        expected.backward()
        assert_close(losses.cross_entropy.double(), expected.detach(), rtol=1e-6, atol=0)
        num_pieces.append(len(spans.starts))
    assert max(num_pieces) > 2
    sum_partial_gradients(local_gradients(model), mesh)
    for name, shard in local_shards(model, lambda parameter: parameter.grad).items():
        gradient, scale = dense[name].grad, dense[name].grad.abs().max().item()
        found, expected = shard.tensor.double(), gradient[shard.slices]
        assert_close(found, expected, rtol=0, atol=2e-5 * scale, msg=name)


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("apart", [True, False])
def test_padding_does_not_change_gradients(mesh: Mesh, apart: bool) -> None:
    """Other padding tokens change no bit of any gradient; more padding changes only rounding."""
    file = documents_of_vocabulary([5, 3, 30, 2, 7, 6, 9])
    numbers = np.arange(len(Rows(file, TINY.seq_length, "pack", "best_fit")))
    config = dataclasses.replace(TINY, hidden_dropout=0.0)
    gradients = []
    for padding_token, multiple_of in ((2, 4), (11, 4), (2, 16)):
        batch = packed(file, numbers, multiple_of, padding_token, apart=apart)
        assert bool((batch.targets == IGNORED_TARGET).any())
        model = tiny_model(mesh, config)
        model(**batch.to(mesh.device).inputs()).objective.backward()
        sum_partial_gradients(local_gradients(model), mesh)
        shards = local_shards(model, lambda parameter: parameter.grad)
        gradients.append([shard.tensor for shard in shards.values()])
    plain, refilled, widened = gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, refilled, strict=True))
    for a, b in zip(plain, widened, strict=True):
        assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


def test_no_target_crosses_between_pieces() -> None:
    """The last target of a document is its eos, and the next input is the next document's bos."""
    file = token_file([5, 3, 4])
    rows = Rows(file, 16, "pack", "best_fit")
    batch = make_micro_batch(file, rows.spans(np.array([0])), np.array([0]), 1, 2)
    documents = [file.tokens[a:b].tolist() for a, b in ((0, 5), (5, 8), (8, 12))]
    assert batch.tokens[0].tolist() == [token for each in documents for token in each[:-1]]
    assert batch.targets[0].tolist() == [token for each in documents for token in each[1:]]
    assert batch.positions[0].tolist() == list(range(9))
    assert batch.documents is None


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_similar_length_are_dealt(seed: int) -> None:
    """Each row comes once, ranks get equally many micro-batches, and neighbours are similar."""
    for num_rows, micro_batch_size, dp_size in [(48, 4, 3), (48, 16, 1), (24, 1, 24), (30, 4, 3)]:
        lengths = random_lengths("log-normal", 64, num_rows, seed)
        dealt = [
            assign_by_length(lengths, micro_batch_size, dp_rank, dp_size)
            for dp_rank in range(dp_size)
        ]
        assert sorted(np.concatenate([np.concatenate(of_rank) for of_rank in dealt]).tolist()) == (
            list(range(num_rows))
        )
        groups = [np.concatenate(parts) for parts in zip(*dealt, strict=True)]
        for wider, narrower in itertools.pairwise(groups):
            assert lengths[wider].min() >= lengths[narrower].max()
        for parts in zip(*dealt, strict=True):
            assert len({len(part) for part in parts}) == 1
            assert all(part.tolist() == sorted(part.tolist()) for part in parts)


def test_padding_fraction_is_that_of_the_micro_batches() -> None:
    """It equals a count on real batches, and grouping by length reduces it."""
    file = token_file((random_lengths("log-normal", 60, 96, 1) + 1).tolist())
    rows = Rows(file, 64, "pad")
    numbers = np.arange(96, dtype=np.int64)
    lengths = rows.lengths(numbers)
    fractions = []
    for assign in (assign_in_order, assign_by_length):
        parts = [part for rank in range(2) for part in assign(lengths, 5, rank, 2)]
        batches = [make_micro_batch(file, rows.spans(part), part, 4, 2) for part in parts]
        slots = sum(batch.tokens.numel() for batch in batches)
        fraction = padding_fraction(lengths, assign, 96, 5, 2, multiple_of=4)
        assert fraction == pytest.approx(1 - sum(batch.num_targets for batch in batches) / slots)
        fractions.append(fraction)
    assert fractions[1] < 0.5 * fractions[0]


@pytest.mark.parametrize("seq_length", [3, 8, 16])
@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_the_documented_waste_is_counted(packing: str, seq_length: int) -> None:
    """`cuts` equals a count token by token of the rows that score it."""
    file = token_file([9, 2, 1, 0, 30, 3, 8, 0, 1, 25, 5])
    rows = Rows(file, seq_length, "pack", packing)
    spans = all_spans(rows)
    row_of_input = {
        place: row
        for start, length, row in zip(spans.starts, spans.lengths, spans.rows, strict=True)
        for place in range(start, start + length)
    }
    short, split, targets, without_beginning, lost = 0, 0, 0, 0, 0
    for start, end in itertools.pairwise(file.document_offsets.tolist()):
        inputs = range(start, end - 1)
        found = [row_of_input.get(place) for place in inputs]
        targets += len(inputs)
        lost += found.count(None)
        without_beginning += sum(row not in (None, found[0]) for row in found)
        if 0 < len(inputs) <= seq_length:
            short += 1
            split += len({*found} - {None}) > 1
    assert cuts(file, rows, seq_length) == Cuts(short, split, targets, without_beginning, lost)
    assert packing == "stream" or split == lost == 0
