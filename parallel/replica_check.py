"""Replicas: what several ranks hold alike, compared by hash.

[Note: replicas]
Over tp, a tensor that is not cut (a norm weight, a row-parallel bias, and the moments of each) is
on every rank, and each rank updates its own copy. The copies stay equal because the gradients are:
partial ones are summed by one collective, whose result is the same everywhere; others (a norm's
without sequence parallelism) every rank computes alike. If a gradient is forgotten in that sum, a
kernel adds in another order on one rank, or a bit flips in one memory, the copies part, and nothing
fails; the loss only gets worse. Over dp no copy is kept: FSDP2 cuts every tensor. What dp ranks
have alike is what they gather for a pass over a block, so that is gathered and compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.collectives import gather_json, move_to
from parallel.mesh import Axis, Mesh
from parallel.parameters import tp_shard_dim


@dataclass(frozen=True)
class ReplicaMismatch:
    """A tensor that ranks of one group should hold alike and don't."""

    name: str
    axis: str  # tp or dp
    ranks: tuple[int, ...]  # of the group, numbered over all ranks
    odd_ranks: tuple[int, ...]  # those that differ from the most; all of them if there is no most

    def __str__(self) -> str:
        odd = ", ".join(map(str, self.odd_ranks))
        return f"{self.name} of rank {odd} among {self.axis} ranks {list(self.ranks)}"


def compare_replicas(
    model: nn.Module, tensors: Mapping[str, DTensor], mesh: Mesh
) -> list[ReplicaMismatch]:
    """Compare all replicas: `tensors` by their names over tp, the gathered weights over dp.

    Every rank calls this and gets the same answer, empty if all is well. Over tp one small
    all-gather, over dp those of one forward pass and a small one for each block, and a report.
    """
    replicated = {
        name: tensor.to_local() for name, tensor in tensors.items() if tp_shard_dim(tensor) is None
    }
    found = _compare(replicated, "tp", mesh.tp)
    if mesh.dp.size > 1:
        found += _compare_gathered(model, mesh)
    everywhere = {
        ReplicaMismatch(
            drift["name"], drift["axis"], tuple(drift["ranks"]), tuple(drift["odd_ranks"])
        )
        for drifts in gather_json(mesh, [asdict(drift) for drift in found])
        for drift in drifts
    }
    return sorted(everywhere, key=lambda drift: (drift.axis, drift.name, drift.ranks))


def _compare_gathered(model: nn.Module, mesh: Mesh) -> list[ReplicaMismatch]:
    """Gather the weights of one block after another, and compare what dp ranks have then."""
    found = []
    for prefix, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.unshard()
        gathered = {}
        assert isinstance(module, nn.Module)
        for name, parameter in module.named_parameters(prefix):
            assert isinstance(parameter, DTensor)
            if "dp" not in (parameter.device_mesh.mesh_dim_names or ()):
                gathered[f"gathered {name}"] = parameter.to_local()
        found += _compare(gathered, "dp", mesh.dp)
        module.reshard()
    return found


def _compare(tensors: Mapping[str, Tensor], name_of_axis: str, axis: Axis) -> list[ReplicaMismatch]:
    if axis.size == 1 or not tensors:
        return []
    device = next(iter(tensors.values())).device
    hashes = move_to(torch.tensor([_hash(tensor) for tensor in tensors.values()]), device)
    of_ranks = hashes.new_empty((axis.size, len(hashes)))
    dist.all_gather_single(of_ranks.view(-1), hashes, group=axis.group)
    ranks = tuple(dist.get_process_group_ranks(axis.group))
    found = []
    for name, column in zip(tensors, move_to(of_ranks, "cpu").t().tolist(), strict=True):
        if len(set(column)) > 1:
            found.append(ReplicaMismatch(name, name_of_axis, ranks, _odd_ones(column, ranks)))
    return found


def _odd_ones(hashes: list[int], ranks: tuple[int, ...]) -> tuple[int, ...]:
    most = max(hashes, key=hashes.count)
    if 2 * hashes.count(most) <= len(hashes):
        return ranks
    return tuple(rank for rank, value in zip(ranks, hashes, strict=True) if value != most)


def _hash(tensor: Tensor) -> int:
    """63 bits of xxh3 of a tensor's bytes."""
    # A copy, because memory that numpy has seen cannot be freed by FSDP2 afterwards.
    copy = move_to(tensor.detach(), "cpu").clone(memory_format=torch.contiguous_format)
    data = copy.view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(data.data) >> 1
