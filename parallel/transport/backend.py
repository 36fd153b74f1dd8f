"""A torch.distributed backend for CPU ranks on one host: gloo with a path through shared memory.

All-gather, reduce-scatter and all-reduce of CPU tensors go through memory that the ranks share, see
shared_memory.py. All other collectives use gloo, and so do groups whose ranks cannot share memory.
Callers see one difference: a collective that is started with async_op=True is complete at once.

A sum adds the ranks in order, for bfloat16 and float16 in float32 with one rounding at the end, so
every rank computes the same bits.
"""

import functools
import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from types import CodeType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from ops.torch_private import (
    ALL_GATHER,
    OTHER_COLLECTIVES,
    REDUCE_SCATTER,
    ProcessGroupGloo,
    completed_work,
    group_by_name,
    make_gloo,
    register_backend,
)
from parallel.transport import shared_memory
from parallel.transport.rendezvous import machine_id
from parallel.transport.shared_memory import SLOT_BYTES, PeerLostError, SharedMemory

logger = logging.getLogger("microtron")

_NAME = "shared_memory"
_GLOO = "gloo_in_one_thread"
_SMALL_BYTES = 1 << 15  # up to here, each rank reduces the whole tensor: one exchange, not two
_HALVES = (torch.bfloat16, torch.float16)
_REDUCIBLE = (*_HALVES, torch.float32, torch.float64, torch.int32, torch.int64)


def cpu_backend(share_memory: bool) -> str:
    """Return the name of the backend for CPU tensors; shared memory needs Linux."""
    return _NAME if share_memory and sys.platform == "linux" else _GLOO


def is_transport_frame(code: CodeType) -> bool:
    """Whether a function belongs to this backend, where a rank waits for its peers."""
    return code.co_filename in (__file__, shared_memory.__file__)


def lost_connection(error: RuntimeError) -> str | None:
    """Describe a peer that has ended or is unreachable in one line; None for other errors."""
    if isinstance(error, PeerLostError):
        return str(error)
    # torch has no type for it: RuntimeError "[.../gloo/transport/tcp/pair.cc:553] Connection ...".
    place, _, problem = str(error).partition("] ")
    if "gloo/transport" not in place:
        return None
    return f"connection to another rank lost: {problem.partition('. ')[0]}"


def _make_backend(options: Any, _: object) -> dist.ProcessGroup | ProcessGroupGloo:
    """Create a group; torch calls this on all its ranks."""
    store, rank, size = options.store, options.group_rank, options.group_size
    gloo = _make_gloo(options, None)
    if size == 1:
        return gloo
    global_ranks = options.global_ranks_in_group or list(range(size))  # empty: all ranks
    own_store = PrefixStore(_NAME, store)
    memory, problem = _share_memory(own_store, rank, global_ranks, options.timeout)
    if memory is None:
        if problem and global_ranks[rank] == 0:
            _warn_once(problem)
        return gloo
    inner = dist.ProcessGroup(store, rank, size)
    register_backend(inner, gloo, options.group_id)
    outer = _SharedMemoryGroup(inner, memory)
    register_backend(outer, gloo)
    return outer


def _make_gloo(options: Any, _: object) -> ProcessGroupGloo:
    return make_gloo(options.store, options.group_rank, options.group_size, options.timeout)


def _share_memory(
    store: Store, rank: int, global_ranks: Sequence[int], timeout: timedelta
) -> tuple[SharedMemory | None, str]:
    """Return the group's memory; or, on all ranks, None and the problem of one rank, if any."""

    def share(name: str, value: Any) -> list[Any]:
        store.set(f"{name}_{rank}", json.dumps(value))
        return [json.loads(store.get(f"{name}_{peer}")) for peer in range(len(global_ranks))]

    machines, pids = zip(*share("process", [machine_id(), os.getpid()]), strict=True)
    if len(set(machines)) > 1:  # where the same number may be another process
        return None, ""
    memory, problem = None, ""
    try:
        memory = SharedMemory(store, rank, pids, timeout, global_ranks)
    except (OSError, AttributeError) as error:  # Python may be built without these functions
        problem = f"rank {global_ranks[rank]}: {error}"
        if rank == 0:  # the others wait for its name; an empty one fails
            store.set("memory", "")
    problem = next(filter(None, share("problem", problem)), "")
    return (None if problem else memory), problem


@functools.cache
def _warn_once(problem: str) -> None:
    logger.warning("ranks use gloo, which is slower, as they cannot share memory: %s", problem)


class _SharedMemoryGroup(dist.ProcessGroup):
    """A process group that shares memory, around gloo's `inner` one.

    Its collectives are operators, so that torch's dispatcher, and thus record_traffic, sees them.
    """

    def __init__(self, inner: dist.ProcessGroup, memory: SharedMemory) -> None:
        super().__init__(memory.rank, memory.ranks)  # type: ignore[call-arg]  # undeclared
        self.inner, self.memory = inner, memory

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        return _NAME

    # The overload that torch.distributed calls.
    def allreduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        if opts.reduceOp.op != dist.ReduceOp.SUM or tensors[0].dtype not in _REDUCIBLE:
            return self.inner.allreduce(tensors, opts)
        torch.ops.microtron.all_reduce(tensors[0], self.group_name)
        return completed_work(tensors)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        torch.ops.microtron.all_gather(output, input, self.group_name)
        return completed_work([output])

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> dist.Work:
        if opts.reduceOp.op != dist.ReduceOp.SUM or input.dtype not in _REDUCIBLE:
            return getattr(self.inner, REDUCE_SCATTER)(output, input, opts)
        torch.ops.microtron.reduce_scatter(output, input, self.group_name)
        return completed_work([output])


setattr(_SharedMemoryGroup, ALL_GATHER, _SharedMemoryGroup.all_gather_single)
setattr(_SharedMemoryGroup, REDUCE_SCATTER, _SharedMemoryGroup.reduce_scatter_single)


def _use_gloo(method: str) -> None:
    def call_gloo(self: _SharedMemoryGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, method)(*args, **kwargs)

    setattr(_SharedMemoryGroup, method, call_gloo)


# The inherited methods would reach gloo from C++ that holds the interpreter's lock: a deadlock if a
# thread of gloo needs that lock to free a tensor.
for _method in OTHER_COLLECTIVES:
    _use_gloo(_method)


def _memory_of(group_name: str) -> SharedMemory:
    group: Any = group_by_name(group_name)
    return cast(SharedMemory, group.memory)


def _all_gather(output: Tensor, input_tensor: Tensor, group_name: str) -> None:
    """Concatenate the inputs of all ranks; the input may be this rank's part of the output."""
    memory = _memory_of(group_name)
    row = input_tensor.view(-1).view(torch.uint8)
    rows = output.view(-1).view(torch.uint8).view(memory.ranks, len(row))
    call = f"all_gather of {len(row)} bytes"
    for begin in range(0, len(row), SLOT_BYTES):
        piece = row[begin : begin + SLOT_BYTES]
        slots = memory.next_slots(torch.uint8)
        slots[memory.rank][: len(piece)].copy_(piece)
        memory.exchange(call)
        for peer in memory.peers:
            rows[peer, begin : begin + len(piece)].copy_(slots[peer][: len(piece)])
    if rows[memory.rank].data_ptr() != row.data_ptr():
        rows[memory.rank].copy_(row)


def _reduce_scatter(output: Tensor, input_tensor: Tensor, group_name: str) -> None:
    """Sum this rank's piece of the input over ranks."""
    memory = _memory_of(group_name)
    result, rows = output.view(-1), input_tensor.view(memory.ranks, output.numel())
    width = SLOT_BYTES // output.itemsize // memory.ranks
    call = f"reduce_scatter of {input_tensor.nbytes} bytes"
    for begin in range(0, len(result), width):
        end = begin + width
        _sum_own_piece(memory, call, rows[:, begin:end].unbind(), result[begin:end])


def _all_reduce(tensor: Tensor, group_name: str) -> None:
    """Sum over ranks in place: by a reduce-scatter and an all-gather unless it is small."""
    memory, whole = _memory_of(group_name), tensor.view(-1)
    call, me = f"all_reduce of {tensor.nbytes} bytes", memory.rank
    if tensor.nbytes <= _SMALL_BYTES:
        terms = [slot[: len(whole)] for slot in memory.next_slots(tensor.dtype)]
        terms[me].copy_(whole)
        memory.exchange(call)
        _sum(terms, whole)
        return
    for part in whole.split(SLOT_BYTES // tensor.itemsize):
        pieces = part.tensor_split(memory.ranks)
        _sum_own_piece(memory, call, pieces, pieces[me])
        slots = memory.next_slots(tensor.dtype)
        slots[me][: len(pieces[me])].copy_(pieces[me])
        memory.exchange(call)
        for peer in memory.peers:
            pieces[peer].copy_(slots[peer][: len(pieces[peer])])


def _sum_own_piece(
    memory: SharedMemory, call: str, pieces: Sequence[Tensor], result: Tensor
) -> None:
    """Sum this rank's piece over ranks in one step; `result` may be that piece."""
    me, slots = memory.rank, memory.next_slots(result.dtype)
    ends = [*itertools.accumulate(map(len, pieces), initial=0)]
    for peer in memory.peers:
        slots[me][ends[peer] : ends[peer + 1]].copy_(pieces[peer])
    memory.exchange(call)
    own = slice(ends[me], ends[me + 1])
    terms = [pieces[me] if rank == me else slot[own] for rank, slot in enumerate(slots)]
    _sum(terms, result)


def _sum(terms: Sequence[Tensor], result: Tensor) -> None:
    """Add the terms in order; `result` may be one of them."""
    first, second, *others = terms
    if not others:
        torch.add(first, second, out=result)
        return
    total = first.float() if result.dtype in _HALVES else first.clone()
    for term in (second, *others):
        total.add_(term)
    result.copy_(total)


# torch keeps its operators and backends in global tables; these are our entries.
_LIBRARY = torch.library.Library("microtron", "FRAGMENT")
for _name, _operator, _output in (
    ("all_gather", _all_gather, "output"),
    ("reduce_scatter", _reduce_scatter, "output"),
    ("all_reduce", _all_reduce, "tensor"),
):
    _schema = torch.library.infer_schema(_operator, mutates_args={_output}, op_name=_name)
    _LIBRARY.impl(_LIBRARY.define(_schema), _operator, "CPU")
for _name, _make in ((_NAME, _make_backend), (_GLOO, _make_gloo)):
    dist.Backend.register_backend(_name, _make, extended_api=True, devices=["cpu"])
