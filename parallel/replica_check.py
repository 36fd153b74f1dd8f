"""Compare, by hash, tensors that several ranks must hold bit for bit.

[Note: replicas]
Over tp, a tensor that is not sharded (a norm weight, a row-parallel bias, and their moments) is
updated by every rank on its own. The copies stay equal because their gradients are. A partial
gradient that is not summed, a kernel that adds in another order on one rank, or a flipped bit makes
them diverge; nothing fails, but the loss gets worse. Over dp x cp FSDP2 shards every tensor, and
the weights it gathers for a block are compared. With HSDP each group of ranks updates the same
shards on its own, and all of them are compared over the groups. Over pp the first and the last
stage share a tied table.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ops.torch_private import all_gather_single
from parallel.collectives import gather_json, move_to
from parallel.mesh import Axis, Mesh
from parallel.parameters import LocalShard


def compare_replicas(model: nn.Module, shards: Mapping[str, LocalShard], mesh: Mesh) -> list[str]:
    """Compare `shards` (by name) over tp and replicas, and the gathered weights over dp x cp.

    Every rank must call it and gets the same result: a phrase for each tensor that differs, with
    the global ranks of the group, and those that differ from its majority (all if it has none).
    One small all-gather over tp and one over replicas; over dp the gathers of a forward pass and a
    small one per block; then one gather of reports.
    """
    replicated = {name: one.tensor for name, one in shards.items() if one.tp_dim is None}
    found = _compare(replicated, "tp", mesh.tp)
    everything = {name: one.tensor for name, one in shards.items()}
    found += _compare(everything, "replicate", mesh.replicas)
    found += _compare({name: t.tensor for name, t in shards.items() if t.is_tied}, "pp", mesh.tied)
    if mesh.dp_cp.size > 1:
        found += _compare_gathered(model, mesh)
    return sorted({mismatch for of_rank in gather_json(mesh, found) for mismatch in of_rank})


def _compare_gathered(model: nn.Module, mesh: Mesh) -> list[str]:
    found = []
    for prefix, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.unshard()
        assert isinstance(module, nn.Module)
        gathered = {
            f"gathered {name}": parameter
            for name, parameter in module.named_parameters(prefix)
            if not isinstance(parameter, DTensor)  # a submodule's, still sharded
        }
        found += _compare(gathered, "dp x cp" if mesh.cp.size > 1 else "dp", mesh.dp_cp)
        module.reshard()
    return found


def _compare(tensors: Mapping[str, Tensor], axis_name: str, axis: Axis) -> list[str]:
    if axis.size == 1 or not tensors:
        return []
    device = next(iter(tensors.values())).device
    hashes = move_to(torch.tensor([_hash(tensor) for tensor in tensors.values()]), device)
    gathered = hashes.new_empty((axis.size, len(hashes)))
    all_gather_single(gathered.view(-1), hashes, group=axis.group)
    ranks = dist.get_process_group_ranks(axis.group)
    return [
        f"{name} on rank {_odd_ranks(column, ranks)} (of {axis_name} ranks {ranks})"
        for name, column in zip(tensors, move_to(gathered, "cpu").t().tolist(), strict=True)
        if len(set(column)) > 1
    ]


def _odd_ranks(hashes: list[int], ranks: list[int]) -> str:
    majority = max(hashes, key=hashes.count)
    is_majority = 2 * hashes.count(majority) > len(hashes)
    odd = [r for r, h in zip(ranks, hashes, strict=True) if h != majority or not is_majority]
    return ", ".join(map(str, odd))


def _hash(tensor: Tensor) -> int:
    """63 bits of xxh3 over the tensor's bytes."""
    # A copy, because FSDP2 cannot free memory that numpy has seen.
    copy = move_to(tensor.detach(), "cpu").clone(memory_format=torch.contiguous_format)
    data = copy.view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(data.data) >> 1
