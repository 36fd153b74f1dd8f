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
    local_shards,
)
from parallel.parameters import shard_range
from tests.distributed import EVERY_LAYOUT, distributed
from tests.weights import full_tensors


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
def test_slices_equal_fsdp_shards(mesh: Mesh, shape: tuple[int, ...], tp_dim: int | None) -> None:
    """FSDP2's shard of a rank is the slice that `local_shards` declares, also for uneven shapes."""
    layer = nn.Module()
    declare_parameter(layer, "weight", WeightSpec(shape, tp_dim, init_std=1.0), mesh)
    fully_shard(layer, mesh=mesh.device_mesh["dp"])
    layer.to_empty(device=mesh.device)
    initialise_parameters(layer, 7, mesh)
    shards = local_shards(layer)
    (shard,) = shards.values()

    full = full_tensors(shards, mesh)["weight"]

    assert full.shape == torch.Size(shape)
    assert shard.tp_dim == tp_dim
    assert shard.tensor.data_ptr() == layer.weight.to_local().data_ptr()
    assert torch.equal(layer.weight.to_local(), full[shard.slices])


@distributed(*EVERY_LAYOUT)
def test_weights_of_one_parameter_are_separated(mesh: Mesh) -> None:
    """Weights that share a parameter have the values they would have in parameters of their own.

    One is sharded over tp, the other replicated; FSDP2 may cut the rows anywhere.
    """
    specs = {
        "a": WeightSpec((13, 3), 0, init_std=1.0),
        "b": WeightSpec((2, 3), 0, init_std=1.0, num_row_groups=1),
    }
    layer = nn.Module()
    declare_parameter(layer, "weight", specs, mesh)
    fully_shard(layer, mesh=mesh.device_mesh["dp"])
    layer.to_empty(device=mesh.device)
    initialise_parameters(layer, 7, mesh)
    shards = local_shards(layer)

    full = full_tensors(shards, mesh)

    assert sum(shard.tensor.numel() for shard in shards.values()) == layer.weight.to_local().numel()
    assert [shard.tp_dim for shard in shards.values()] == [0, 0 if mesh.tp.size == 1 else None]
    assert [shard.grad_is_partial for shard in shards.values()] == [False, mesh.tp.size > 1]
    for name, spec in specs.items():
        generator = torch.Generator().manual_seed(fold_seed(7, name))
        expected = torch.empty(spec.shape).normal_(0.0, 1.0, generator=generator)
        assert torch.equal(full[name], expected), name
        assert torch.equal(shards[name].tensor, expected[shards[name].slices]), name


@distributed(*EVERY_LAYOUT)
def test_initial_weights_do_not_depend_on_the_layout(mesh: Mesh) -> None:
    """Initial weights are a function of seed and name, bit for bit."""
    layer = nn.Module()
    declare_parameter(layer, "weight", WeightSpec((6, 4), 1, init_std=0.5), mesh)
    fully_shard(layer, mesh=mesh.device_mesh["dp"])
    layer.to_empty(device=mesh.device)
    initialise_parameters(layer, 1234, mesh)
    generator = torch.Generator().manual_seed(fold_seed(1234, "weight"))
    expected = torch.empty(6, 4).normal_(0.0, 0.5, generator=generator)
    assert torch.equal(full_tensors(local_shards(layer), mesh)["weight"], expected)
