"""Collectives: on activations (asynchronous and synchronous), and on small control values.

Those on activations act on dim 0, the sequence. Each allocates its output, because a collective
must not write into a tensor that autograd has saved.

[Note: agreement]
A branch that only some ranks take deadlocks at the next collective. So facts that one rank knows
(a signal, a full disk) are shared first: `any_rank`, `sum_on_host`, `gather_json`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ops.torch_private import all_gather_single, reduce_scatter_single
from parallel.mesh import Axis, Mesh

WAITING_FOR_RANKS = "waiting for ranks"  # in a trace of torch.profiler


@dataclass(frozen=True)
class Pending:
    """The output of a collective that may still be running."""

    tensor: Tensor
    work: Sequence[dist.Work] = ()  # empty: complete

    def wait(self) -> Tensor:
        """Wait for the collective; returns its output."""
        for work in self.work:
            await_work(work)
        return self.tensor


def await_work(work: dist.Work) -> None:
    """Wait for an asynchronous collective."""
    with record_function(WAITING_FOR_RANKS):
        work.wait()


def move_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy between host and device memory; returns the tensor itself if it is there already.

    A copy waits for all work queued on the device, on a GPU for collectives too. Training makes
    every such copy through this function, so that the watchdog can tell waiting from hanging.
    """
    return tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a device."""
    if device.type == "cuda":
        # `torch.cuda.set_sync_debug_mode` would warn of a stream's synchronize, not of an event's.
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        event.synchronize()


def is_blocking_frame(code: CodeType) -> bool:
    """Whether a function only waits for other ranks, or for a device that may wait for them."""
    return code in {function.__code__ for function in (await_work, move_to, synchronize)}


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    """Start gathering all ranks' positions, `[s/t, ...]` to `[s, ...]`; x must not change."""
    gathered = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    work = all_gather_single(gathered, x.contiguous(), group=axis.group, async_op=True)
    return Pending(gathered, [work])


def start_reduce_scatter(x: Tensor, axis: Axis) -> Pending:
    """Start summing over ranks into each rank's positions, `[s, ...]` to `[s/t, ...]`."""
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} positions over tp={axis.size}"
    scattered = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    work = reduce_scatter_single(scattered, x.contiguous(), group=axis.group, async_op=True)
    return Pending(scattered, [work])


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    """Start summing over ranks, `[s, ...]`."""
    reduced = x.clone(memory_format=torch.contiguous_format)
    return Pending(reduced, [dist.all_reduce(reduced, group=axis.group, async_op=True)])


def start_shift(x: Tensor, received: Tensor, axis: Axis) -> Pending:
    """Start a ring shift: send x to the next rank, and fill `received` from the previous one."""
    ranks = dist.get_process_group_ranks(axis.group)
    following, before = (ranks[(axis.rank + step) % axis.size] for step in (1, -1))
    both = [
        dist.P2POp(dist.isend, x, following, axis.group),
        dist.P2POp(dist.irecv, received, before, axis.group),
    ]
    return Pending(received, dist.batch_isend_irecv(both))


def start_tp_reduce(x: Tensor, mesh: Mesh) -> Pending:
    """Start the sum that ends a tensor-parallel region, `[s, ...]` to `[s/t, ...]` (or itself)."""
    if mesh.tp.size == 1:
        return Pending(x)
    if mesh.sequence_parallel:
        return start_reduce_scatter(x, mesh.tp)
    return start_all_reduce(x, mesh.tp)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Gather all ranks' positions, `[s/t, ...]` to `[s, ...]`."""
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks into each rank's positions, `[s, ...]` to `[s/t, ...]`."""
    return start_reduce_scatter(x, axis).wait()


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over ranks, `[s, ...]`."""
    return start_all_reduce(x, axis).wait()


def local_sequence_chunk(x: Tensor, axis: Axis) -> Tensor:
    """Copy this rank's positions, `[s, ...]` to `[s/t, ...]`; a view would keep x in memory."""
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} positions over tp={axis.size}"
    return x.chunk(axis.size)[axis.rank].clone(memory_format=torch.contiguous_format)


def all_to_all(
    output: Tensor,
    output_sizes: list[int],
    input: Tensor,
    input_sizes: list[int],
    axis: Axis,
) -> None:
    """Send consecutive parts of `input` to the ranks of an axis, and receive theirs."""
    sizes = output_sizes, input_sizes
    work = dist.all_to_all_single(output, input, *sizes, group=axis.group, async_op=True)
    assert work is not None
    await_work(work)


def sum_over(axis: Axis, values: Tensor) -> Tensor:
    """Sum `values` over the ranks of an axis, in place; one all-reduce."""
    if axis.size > 1:
        with record_function(WAITING_FOR_RANKS):
            dist.all_reduce(values, group=axis.group)
    return values


def sum_on_host(mesh: Mesh, values: Tensor, flags: Sequence[float]) -> list[float]:
    """Sum float64 `values` `[n]` on the device, and `flags`, over all ranks.

    The only wait of a step: for the device, then for one all-reduce on the host, even with a GPU.
    """
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=mesh.device.type != "cpu")
    on_host.copy_(values, non_blocking=True)
    synchronize(mesh.device)
    on_host = torch.cat([on_host, torch.tensor(flags, dtype=values.dtype)])
    return cast(list[float], sum_over(mesh.world, on_host).tolist())


def any_rank(mesh: Mesh, flag: bool) -> bool:
    """Whether the flag is true on any rank."""
    return bool(sum_over(mesh.world, torch.tensor([flag], dtype=torch.int32)))


def gather_json(mesh: Mesh, report: Any) -> list[Any]:
    """Gather all ranks' reports, in rank order, as JSON; torch's object collectives use pickle."""
    if mesh.world.size == 1:
        return [json.loads(json.dumps(report))]
    encoded = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)
    encoded = move_to(encoded, mesh.device)
    length = move_to(torch.tensor([len(encoded)]), mesh.device)
    lengths = [torch.empty_like(length) for _ in range(mesh.world.size)]
    dist.all_gather(lengths, length, group=mesh.world.group)
    sizes = move_to(torch.cat(lengths), "cpu").tolist()
    padded = encoded.new_zeros(max(sizes))
    padded[: len(encoded)] = encoded
    reports = [torch.empty_like(padded) for _ in range(mesh.world.size)]
    dist.all_gather(reports, padded, group=mesh.world.group)
    return [
        json.loads(bytes(move_to(report, "cpu")[:size].numpy()))
        for report, size in zip(reports, sizes, strict=True)
    ]
