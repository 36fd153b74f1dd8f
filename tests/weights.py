"""Whole weights and gradients of sharded models, for comparison with dense ones."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from parallel import LocalShard, Mesh, local_shards, sum_over


def gradient_shards(model: nn.Module) -> dict[str, LocalShard]:
    """This rank's part of the gradient of every weight, by name."""
    return local_shards(model, lambda parameter: cast(Tensor, parameter.grad))


def clone_tensors(shards: Mapping[str, LocalShard]) -> dict[str, Tensor]:
    """Copies of this rank's tensors, which later updates leave unchanged."""
    return {name: shard.tensor.clone() for name, shard in shards.items()}


def full_tensors(shards: Mapping[str, LocalShard], mesh: Mesh) -> dict[str, Tensor]:
    """The whole tensors, on every rank; of one replicated over tp, this rank's copy.

    Every part must be on one rank of dp x cp (with HSDP: of each replica), as FSDP2 has it.
    """
    full = {}
    for name, shard in shards.items():
        whole = torch.zeros(shard.global_shape, dtype=shard.tensor.dtype)
        if mesh.replicas.rank == 0:
            whole[shard.slices] = shard.tensor
        full[name] = sum_over(mesh.dp_cp if shard.tp_dim is None else mesh.world, whole)
    return full


def fill(shards: Mapping[str, LocalShard], full: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of whole tensors."""
    for name, shard in shards.items():
        shard.tensor.copy_(full[name][shard.slices])
