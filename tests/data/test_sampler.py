"""The order of samples in a source: a permutation per epoch, computed without history."""

import numpy as np
import pytest

from data.sampler import permute, sample_rows


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 5000])
def test_every_epoch_is_a_permutation(size: int) -> None:
    """Each place of [0, size) is hit exactly once."""
    for epoch in range(3):
        rows = permute(np.arange(size), size, 7, epoch)
        assert np.array_equal(np.sort(rows), np.arange(size))


def test_any_part_can_be_computed_alone() -> None:
    """Samples computed one by one, in part and all at once are the same."""
    at_once = sample_rows(np.arange(500), 37, seed=3)
    singly = [int(sample_rows(np.array([i]), 37, seed=3)[0]) for i in range(500)]
    assert at_once.tolist() == singly
    assert np.array_equal(at_once[113:391], sample_rows(np.arange(113, 391), 37, seed=3))


def test_epochs_hold_each_row_once() -> None:
    """Each epoch holds each row once, in an order of its own."""
    rows = sample_rows(np.arange(4 * 101), 101, seed=5).reshape(4, 101)
    assert all(sorted(epoch) == list(range(101)) for epoch in rows.tolist())
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4


def test_seeds_differ() -> None:
    """Neighbouring, negative and huge seeds give different orders, and so do sources."""
    places = np.arange(100)
    orders = {tuple(sample_rows(places, 100, seed)) for seed in (0, 1, 2, -1, 2**63, 2**70 + 9)}
    orders |= {tuple(sample_rows(places, 100, 0, source)) for source in range(4)}
    assert len(orders) == 9


@pytest.mark.parametrize("size", [3, 10, 37])
def test_first_sample_is_uniform_over_epochs(size: int) -> None:
    """Over many epochs each row comes first equally often (chi-square, 5 sigma)."""
    num_epochs = 100 * size
    first = [int(permute(np.array([0]), size, 11, epoch)[0]) for epoch in range(num_epochs)]
    counts = np.bincount(first, minlength=size)
    chi_square = float(((counts - 100) ** 2 / 100).sum())
    assert chi_square < (size - 1) + 5 * np.sqrt(2 * (size - 1))


def test_order_has_no_trend() -> None:
    """Neighbours are n / 3 apart on average, like independent draws."""
    size = 20_000
    rows = permute(np.arange(size), size, 1, 0)
    assert np.abs(np.diff(rows)).mean() == pytest.approx(size / 3, rel=0.03)
    assert abs(np.corrcoef(np.arange(size), rows)[0, 1]) < 5 / np.sqrt(size)
