"""Dropout masks are pure functions, and pass statistical tests."""

import dataclasses

import pytest
import torch

from ops.dropout import keep_mask, site_index
from parallel import (
    DropoutStream,
    Mesh,
    dropout_add,
    fold_seed,
    prepare_masks,
    randomness,
    sequence_shard,
)
from tests.distributed import ONE_RANK, TENSOR_PARALLEL, Layout, distributed
from tests.streams import stream

RATE = 0.1


def keys_of(masks: DropoutStream, layer: int, site: int) -> torch.Tensor:
    assert masks.keys is not None
    return masks.keys[site_index(layer, site)]


def mask(masks: DropoutStream, layer: int = 0, site: int = 1, positions: int = 64) -> torch.Tensor:
    keys = keys_of(masks, layer, site)
    return keep_mask(torch.Size((positions, keys.shape[1], 96)), 0, RATE, keys)


def test_a_shard_of_the_mask_is_the_mask_of_the_shard() -> None:
    """Rows computed from their global position equal those of the full mask."""
    masks = stream(seed=1, step=2, samples=(5, 6))
    whole = mask(masks)
    part = keep_mask(torch.Size((16, 2, 96)), 48, RATE, keys_of(masks, 0, 1))
    assert torch.equal(part, whole[48:])


def test_a_mask_does_not_depend_on_the_batch() -> None:
    """Sample 6 has the same mask in any batch and at any index of it."""
    first = mask(stream(1, 2, (5, 6)))[:, 1]
    second = mask(stream(1, 2, (6, 9)))[:, 0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_dropout_rate_is_right(rate: float) -> None:
    """Within four standard deviations of the binomial over a million elements."""
    keys = keys_of(stream(3, 4, range(8)), 1, 1)
    kept = keep_mask(torch.Size((256, 8, 512)), 0, rate, keys).double().mean().item()
    deviation = (rate * (1 - rate) / (256 * 8 * 512)) ** 0.5
    assert abs(kept - (1 - rate)) <= 4 * deviation + 1e-9


def test_different_masks_are_uncorrelated() -> None:
    """Changing any argument, or shifting along any dim, gives an uncorrelated mask."""
    base = stream(1, 2, (5,))
    x = mask(base, positions=512).double() - (1 - RATE)
    others = {
        "seed": mask(stream(2, 2, (5,)), positions=512),
        "step": mask(stream(1, 3, (5,)), positions=512),
        "sample": mask(stream(1, 2, (6,)), positions=512),
        "layer": mask(base, layer=1, positions=512),
        "site": mask(base, site=2, positions=512),
        "position": mask(base, positions=512).roll(1, 0),
        "channel": mask(base, positions=512).roll(1, 2),
    }
    limit = 4.5 / x.numel() ** 0.5
    for name, other in others.items():
        correlation = (x * (other.double() - (1 - RATE))).mean() / (RATE * (1 - RATE))
        assert abs(correlation.item()) < limit, name


def test_every_channel_and_position_drops_alike() -> None:
    """Chi-squared of the counts per row and per column is within five deviations."""
    x = (~mask(stream(7, 7, range(16)), positions=256)).double()
    for dims, cells in (((0, 1), 96), ((1, 2), 256)):
        counts = x.sum(dims)
        expected = x.numel() / cells * RATE
        chi_squared = ((counts - expected) ** 2 / (expected * (1 - RATE))).sum().item()
        assert abs(chi_squared - cells) < 5 * (2 * cells) ** 0.5


@distributed(ONE_RANK, *TENSOR_PARALLEL)
@pytest.mark.parametrize("stored", [False, True])
def test_dropout_add_equals_the_formula(mesh: Mesh, stored: bool) -> None:
    """Forward and both gradients on the shard, from the mask of the full sequence."""
    masks = stream(1, 2, (5, 6))
    whole = keep_mask(torch.Size((8, 2, 6)), 0, RATE, keys_of(masks, 3, 1)).double()
    scaled = sequence_shard(whole / (1 - RATE), mesh)
    x = torch.randn(scaled.shape, dtype=torch.float64).requires_grad_()
    residual = torch.randn(scaled.shape, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(scaled.shape, dtype=torch.float64)
    if stored:
        masks = prepare_masks(masks, tuple(x.shape), RATE, mesh)
        assert masks.masks is not None

    y = dropout_add(x, residual, RATE, masks, 3, 1, mesh)
    y.backward(upstream)

    torch.testing.assert_close(y, residual + x * scaled)
    torch.testing.assert_close(x.grad, upstream * scaled)
    assert torch.equal(residual.grad, upstream)
    without = dropout_add(x, residual, RATE, None, 3, 1, mesh)
    assert torch.equal(without, x + residual)


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_masks_change_no_bit(mesh: Mesh, dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of masks that are computed again in backward."""
    stored = prepare_masks(stream(1, 2, (5, 6)), (32, 2, 48), RATE, mesh)
    results = []
    for masks in (stored, dataclasses.replace(stored, masks=None)):
        torch.manual_seed(1)
        x, residual = torch.randn(2, 32, 2, 48, dtype=dtype).unbind()
        x.requires_grad_()
        y = dropout_add(x, residual, RATE, masks, 1, 2, mesh)
        y.backward(torch.randn_like(y))
        results.append((y.detach(), x.grad))
    assert all(map(torch.equal, *results))


@distributed(ONE_RANK)
def test_large_masks_are_not_stored(mesh: Mesh) -> None:
    """All masks of a micro-batch count together."""
    masks = stream(1, 2, (5, 6))
    assert masks.keys is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "STORED_ELEMENTS", len(masks.keys) * 32 * 2 * 48)
        assert prepare_masks(masks, (32, 2, 48), RATE, mesh).masks is not None
        assert prepare_masks(masks, (33, 2, 48), RATE, mesh).masks is None


@distributed(Layout(pp=2))
def test_stages_store_no_masks(mesh: Mesh) -> None:
    """They would be those of all stages."""
    assert prepare_masks(stream(1, 2, (5, 6)), (32, 2, 48), RATE, mesh).masks is None


def test_fold_seed_separates_its_parts() -> None:
    """("ab", "c") and ("a", "bc") give different seeds."""
    assert fold_seed(1, "ab", "c") != fold_seed(1, "a", "bc")
    assert fold_seed(1, "x") != fold_seed(2, "x")
    assert 0 <= fold_seed(2**62, "x") < 2**63
