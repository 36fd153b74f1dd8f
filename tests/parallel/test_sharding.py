"""Shards agree with torch.chunk and with FSDP2's placements."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from configs.weights import WeightSpec
from parallel import (
    Mesh,
    declare_parameter,
    fold_seed,
    initialise_parameters,
    local_slices,
    tp_shard_dim,
)
from parallel.parameters import shard_range
from tests.distributed import EVERY_LAYOUT, distributed


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 603, 16384])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 8])
def test_shard_range_is_torch_chunk(size: int, parts: int) -> None:
    """Every row is in one shard; where torch returns fewer chunks, ours are empty."""
    rows = torch.arange(size)
    chunks = [chunk.tolist() for chunk in rows.chunk(parts)]
    ours = [rows[slice(*shard_range(size, parts, index))].tolist() for index in range(parts)]
    assert ours == chunks + [[]] * (parts - len(chunks))


@distributed(*EVERY_LAYOUT)
@pytest.mark.parametrize(("shape", "tp_dim"), [((13, 6), 0), ((5, 11), 1), ((7,), None), ((9,), 0)])
def test_slices_are_what_fsdp_keeps(mesh: Mesh, shape: tuple[int, ...], tp_dim: int | None) -> None:
    """FSDP2's shard of a rank is the slice of `local_slices`, also for uneven shapes."""
    layer = nn.Module()
    declare_parameter(layer, "weight", WeightSpec(shape, tp_dim, init_std=1.0), mesh)
    fully_shard(layer, mesh=mesh.device_mesh["dp"])
    layer.to_empty(device="cpu")
    initialise_parameters(layer, 7, mesh)
    weight = layer.weight

    full = weight.full_tensor()

    assert full.shape == torch.Size(shape)
    assert tp_shard_dim(weight) == tp_dim
    mine = local_slices(shape, tp_dim, mesh.tp, mesh.dp)
    assert torch.equal(weight.to_local(), full[mine])


@distributed(*EVERY_LAYOUT)
def test_initial_weights_do_not_depend_on_the_layout(mesh: Mesh) -> None:
    """They are a function of seed and name, bit for bit."""
    layer = nn.Module()
    declare_parameter(layer, "weight", WeightSpec((6, 4), 1, init_std=0.5), mesh)
    fully_shard(layer, mesh=mesh.device_mesh["dp"])
    layer.to_empty(device="cpu")
    initialise_parameters(layer, 1234, mesh)
    generator = torch.Generator().manual_seed(fold_seed(1234, "weight"))
    expected = torch.empty(6, 4).normal_(0.0, 0.5, generator=generator)
    assert torch.equal(layer.weight.full_tensor(), expected)
