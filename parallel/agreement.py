"""Small facts that all ranks must share before they branch: counts, flags and short reports.

A branch that some ranks take and others don't is a deadlock at the next collective, so whatever is
known to one rank only (a signal, a full disk) passes through here first.
"""

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.profiler import record_function

from parallel.collectives import WAITING_FOR_RANKS, move_to
from parallel.mesh import Axis, Mesh


def sum_over(axis: Axis, values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the ranks of an axis, in place; one all-reduce."""
    if axis.size > 1:
        with record_function(WAITING_FOR_RANKS):
            dist.all_reduce(values, group=axis.group)
    return values


def any_rank(mesh: Mesh, flag: bool) -> bool:
    """Whether any rank says yes."""
    return sum_flags(mesh, [flag]) != [0]


def sum_flags(mesh: Mesh, flags: Sequence[bool]) -> list[int]:
    """How many ranks raise each flag; one all-reduce."""
    counts = move_to(torch.tensor(flags, dtype=torch.int32), mesh.device)
    return cast(list[int], move_to(sum_over(mesh.world, counts), "cpu").tolist())


def gather_json(mesh: Mesh, report: Any) -> list[Any]:
    """Every rank's report, in the order of ranks, on every rank.

    JSON rather than torch's own object collectives, which are pickle on the wire.
    """
    if mesh.world.size == 1:
        return [json.loads(json.dumps(report))]
    encoded = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
    encoded = move_to(encoded, mesh.device)
    length = move_to(torch.tensor([len(encoded)]), mesh.device)
    lengths = [torch.empty_like(length) for _ in range(mesh.world.size)]
    dist.all_gather(lengths, length, group=mesh.world.group)
    sizes = move_to(torch.cat(lengths), "cpu").tolist()
    longest = max(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=mesh.device)
    padded[: len(encoded)] = encoded
    reports = [torch.empty_like(padded) for _ in range(mesh.world.size)]
    dist.all_gather(reports, padded, group=mesh.world.group)
    return [
        json.loads(bytes(move_to(report, "cpu")[:size].numpy()))
        for report, size in zip(reports, sizes, strict=True)
    ]
