"""A backend of torch.distributed for the ranks of one host: gloo, with a short cut.

Gloo hands bytes to the kernel and takes them back, also between processes that could look at the
same page. Here all-gather, reduce-scatter and all-reduce of tensors on processors go through memory
that the ranks share (shared_memory.py says how, and why it is safe). All else is gloo's, and so is
a group whose ranks cannot share memory. Who communicates, our mappings or FSDP2, sees no difference
but one: a collective that was asked for without waiting is done when the call returns.

Sums are taken in the order of ranks, of bfloat16 and float16 in float32 with one rounding at the
end, so they depend on nothing but the inputs, and all ranks see the same ones.
"""

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllreduceOptions,
    ProcessGroupGloo,
)
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import GroupName

from parallel.transport import shared_memory
from parallel.transport.rendezvous import machine_id
from parallel.transport.shared_memory import SLOT_BYTES, PeerLostError, SharedMemory

logger = logging.getLogger("microtron")

_NAME = "shared_memory"
# An all-reduce of at most this is done in full by every rank: one meeting instead of two.
_SMALL_BYTES = 1 << 15
_ALIGNED = 64  # elements; pieces of that many begin where vector instructions like it

_TWO = 2  # ranks, for whom a sum is one operation
_HALVES = (torch.bfloat16, torch.float16)
_SUMMED = (*_HALVES, torch.float32, torch.float64, torch.int32, torch.int64)
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "max": torch.maximum}


def cpu_backend(share_memory: bool) -> str:
    """The name of torch's backend for tensors on this machine's processors.

    Shared memory needs Linux, and x86 for the order in which it is written; else gloo.
    """
    if share_memory and sys.platform == "linux" and platform.machine() == "x86_64":
        return _NAME
    return "gloo"


def is_transport_frame(code: CodeType) -> bool:
    """Whether a function is of this backend: to be inside is to wait, on whatever line."""
    return code.co_filename in (__file__, shared_memory.__file__)


def lost_connection(error: RuntimeError) -> str | None:
    """One line about a peer that has ended or cannot be reached; None if the error is another."""
    if isinstance(error, PeerLostError):
        return str(error)
    # torch has no type for it: RuntimeError "[.../gloo/transport/tcp/pair.cc:553] Connection ...".
    place, _, problem = str(error).partition("] ")
    if "gloo/transport" not in place:
        return None
    return f"connection to another rank lost: {problem.partition('. ')[0]}"


def _make_backend(options: Any, _: object) -> dist.ProcessGroup | ProcessGroupGloo:
    """What torch calls for each group, on all its ranks."""
    store, rank, size = options.store, options.group_rank, options.group_size
    gloo = ProcessGroupGloo(store, rank, size, options.timeout)
    if size == 1:
        return gloo
    global_ranks = options.global_ranks_in_group or list(range(size))  # none: all of them
    store_here = PrefixStore(_NAME, store)
    memory, problem = _share_memory(store_here, rank, global_ranks, options.timeout)
    if memory is None:
        if rank == 0:
            logger.info("a group of %d ranks uses gloo, not shared memory: %s", size, problem)
        return gloo
    inner = dist.ProcessGroup(store, rank, size)
    for group in (inner, outer := _SharedMemoryGroup(inner, memory)):
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    inner._set_group_name(options.group_id)
    return outer


def _share_memory(
    store: Store, rank: int, global_ranks: Sequence[int], timeout: timedelta
) -> tuple[SharedMemory | None, str]:
    """The group's memory; or none, on all ranks, and why one of them cannot have it."""
    size = len(global_ranks)
    store.set(f"process_{rank}", json.dumps([machine_id(), os.getpid()]))
    places = [json.loads(store.get(f"process_{peer}")) for peer in range(size)]
    # On another host or in another container, a process of that number is another one.
    if any(machine != places[0][0] for machine, _ in places):
        return None, "not all ranks are on one host and in one container"
    pids = [pid for _, pid in places]
    memory, problem = None, ""
    try:
        memory = SharedMemory(store, rank, pids, timeout, global_ranks)
    except OSError as error:
        problem = f"rank {global_ranks[rank]}: {error}"
    store.set(f"problem_{rank}", problem)
    problems = [store.get(f"problem_{peer}").decode() for peer in range(size)]
    problem = next(filter(None, problems), "")
    return (None if problem else memory), problem


class _Done(dist.Work):
    """The handle of a collective that is over."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> list[Tensor]:
        return self._tensors

    def get_future(self) -> Any:
        future: Any = torch.futures.Future()
        future.set_result(self._tensors)
        return future


class _SharedMemoryGroup(dist.ProcessGroup):
    """A process group: gloo's `inner` one, and around it what goes through memory.

    Each of its own methods passes torch's dispatcher on its way to the memory, as any backend's
    does, so that record_traffic sees it.
    """

    def __init__(self, inner: dist.ProcessGroup, memory: SharedMemory) -> None:
        super().__init__(memory.rank, memory.ranks)  # type: ignore[call-arg]  # what 2.13 has
        self.inner, self.memory = inner, memory

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        return _NAME

    def allreduce(  # type: ignore[override]  # of several forms, the one that torch.distributed calls
        self, tensors: list[Tensor], opts: AllreduceOptions
    ) -> dist.Work:
        reduction = _name(opts.reduceOp)
        if reduction is None or tensors[0].dtype not in _SUMMED:
            return self.inner.allreduce(tensors, opts)
        torch.ops.microtron.all_reduce(*tensors, reduction, self.group_name)
        return _Done(tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        torch.ops.microtron.all_gather(output, input, self.group_name)
        return _Done([output])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        if _name(opts.reduceOp) != "sum" or input.dtype not in _SUMMED:
            return self.inner.reduce_scatter_single(output, input, opts)
        torch.ops.microtron.reduce_scatter(output, input, self.group_name)
        return _Done([output])


def _pass_on(method: str) -> None:
    def passed_on(self: _SharedMemoryGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, method)(*args, **kwargs)

    setattr(_SharedMemoryGroup, method, passed_on)


# Inherited, these would reach gloo too, but from C++ that holds the interpreter's lock: a deadlock
# if a thread of gloo's needs it to drop a tensor. Other methods don't pass through such code.
for _method in (
    "allgather",
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allreduce_coalesced",
    "barrier",
    "broadcast",
    "recv",
    "reduce_scatter",
    "reduce_scatter_single_coalesced",
    "send",
):
    _pass_on(_method)


def _name(operation: Any) -> str | None:
    return {dist.ReduceOp.SUM: "sum", dist.ReduceOp.MAX: "max"}.get(operation.op)


def _memory_of(group_name: str, *tensors: Tensor) -> SharedMemory:
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("a collective needs contiguous tensors")
    group: Any = torch._C._distributed_c10d._resolve_process_group(GroupName(group_name))
    return group.memory


def _check(whole: Tensor, piece: Tensor, ranks: int) -> None:
    if whole.numel() != ranks * piece.numel() or whole.dtype != piece.dtype:
        raise ValueError(
            f"{ranks} ranks' pieces of {piece.numel()} elements of {piece.dtype} don't make "
            f"{whole.numel()} of {whole.dtype}"
        )


def _all_gather(output: Tensor, input_tensor: Tensor, group_name: str) -> None:
    """The parts of all ranks, in their order; a part may be its own place in the output."""
    memory = _memory_of(group_name, output, input_tensor)
    _check(output, input_tensor, memory.ranks)
    row = input_tensor.view(-1).view(torch.uint8)
    rows = output.view(-1).view(torch.uint8).view(memory.ranks, len(row))
    for begin in range(0, len(row), SLOT_BYTES):
        piece = row[begin : begin + SLOT_BYTES]
        slots = memory.next_slots(torch.uint8)
        slots[memory.rank][: len(piece)].copy_(piece)
        memory.meet("all_gather", len(row))
        for rank, slot in enumerate(slots):
            if rank != memory.rank:
                rows[rank, begin : begin + len(piece)].copy_(slot[: len(piece)])
    if rows[memory.rank].data_ptr() != row.data_ptr():
        rows[memory.rank].copy_(row)


def _reduce_scatter(output: Tensor, input_tensor: Tensor, group_name: str) -> None:
    """The sum over ranks of the piece of the input that has this rank's number."""
    memory = _memory_of(group_name, output, input_tensor)
    ranks, me, dtype = memory.ranks, memory.rank, input_tensor.dtype
    _check(input_tensor, output, ranks)
    scattered, rows = output.view(-1), input_tensor.view(ranks, output.numel())
    width = SLOT_BYTES // dtype.itemsize // ranks // _ALIGNED * _ALIGNED
    for begin in range(0, len(scattered), width):
        pieces = rows[:, begin : begin + width]
        length = pieces.shape[1]
        slots = [slot[: ranks * length].view(ranks, -1) for slot in memory.next_slots(dtype)]
        if ranks == _TWO:
            slots[me][1 - me].copy_(pieces[1 - me])
        else:
            slots[me].copy_(pieces)
        memory.meet("reduce_scatter", input_tensor.nbytes)
        terms = [slot[me] for slot in slots]
        if ranks == _TWO:  # among more, the output may lie in the input, and not be written yet
            terms[me] = pieces[me]
        _reduce("sum", terms, scattered[begin : begin + length])


def _all_reduce(tensor: Tensor, reduction: str, group_name: str) -> None:
    """The sum, or another reduction, over ranks, in place."""
    memory = _memory_of(group_name, tensor)
    whole, call, me = tensor.view(-1), f"all_reduce {reduction}", memory.rank
    if tensor.nbytes <= _SMALL_BYTES:
        slots = [slot[: len(whole)] for slot in memory.next_slots(tensor.dtype)]
        slots[me].copy_(whole)
        memory.meet(call, tensor.nbytes)
        _reduce(reduction, slots, whole)
        return
    for part in whole.split(SLOT_BYTES // tensor.dtype.itemsize):
        # Each rank reduces its piece, and all gather the pieces. The last ranks may have none.
        share = -(-len(part) // memory.ranks)
        pieces = part.split(-(-share // _ALIGNED) * _ALIGNED)
        given = [slot[: len(part)] for slot in memory.next_slots(tensor.dtype)]
        terms = [slot.split(len(pieces[0])) for slot in given]
        for rank, piece in enumerate(pieces):
            if rank != me:
                terms[me][rank].copy_(piece)
        memory.meet(call, tensor.nbytes)
        reduced = memory.next_slots(tensor.dtype)
        if me < len(pieces):
            own = [pieces[me] if rank == me else term[me] for rank, term in enumerate(terms)]
            _reduce(reduction, own, reduced[me][: len(pieces[me])])
        memory.meet(call, tensor.nbytes)
        for piece, slot in zip(pieces, reduced, strict=False):
            piece.copy_(slot[: len(piece)])


def _reduce(reduction: str, terms: list[Tensor], result: Tensor) -> None:
    """Of two terms either may be the result; of more, none."""
    combine = _REDUCTIONS[reduction]
    if len(terms) > _TWO and result.dtype in _HALVES:
        total = terms[0].float()
        for term in terms[1:]:
            combine(total, term, out=total)
        result.copy_(total)
        return
    combine(terms[0], terms[1], out=result)
    for term in terms[2:]:
        combine(result, term, out=result)


# torch's dispatcher and its list of backends are global; this is where we enter them.
_LIBRARY = torch.library.Library("microtron", "FRAGMENT")
for _schema, _function in (
    ("all_gather(Tensor(a!) output, Tensor input_tensor, str group_name) -> ()", _all_gather),
    (
        "reduce_scatter(Tensor(a!) output, Tensor input_tensor, str group_name) -> ()",
        _reduce_scatter,
    ),
    ("all_reduce(Tensor(a!) tensor, str reduction, str group_name) -> ()", _all_reduce),
):
    _LIBRARY.impl(_LIBRARY.define(_schema), _function, "CPU")
dist.Backend.register_backend(_NAME, _make_backend, extended_api=True, devices=["cpu"])
