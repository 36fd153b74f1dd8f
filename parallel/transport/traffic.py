"""Record the collectives that this process issues, and a fake mesh to do so without other ranks.

Every collective passes torch's dispatcher, in forward and backward, whether our mappings, FSDP2 or
its DTensors issue it. A dispatch mode records it there.

[Note: bytes on a ring]
Let M be the bytes of the full tensor: after a gather, before a scatter, or as reduced. On a ring of
t ranks an all-gather or a reduce-scatter takes t - 1 rounds, in each of which a rank sends M/t to
its neighbour. An all-reduce is both, one after the other (Thakur et al. 2005):

    all-gather, reduce-scatter      (t - 1) / t M
    all-reduce                    2 (t - 1) / t M

A backend may do otherwise; this is the measure for comparing layouts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ops.scratch import scratch_scope
from ops.torch_dry_run import (
    TorchDispatchMode,
    arguments_by_name,
    forget_sharding_rules,
    init_fake_process_group,
    operator_name,
)
from ops.torch_private import group_by_name
from parallel.mesh import Mesh, Overlap, close_mesh, make_mesh

_NAMESPACES = ("c10d", "_c10d_functional", "microtron")  # torch's, and that of backend.py
_INPUT_NAMES = ("input_tensor", "input_tensors", "input", "inputs", "tensor", "tensors")
_GROUP_NAMES = ("process_group", "group_name")
# Bytes sent, in units of (t - 1) / t M: see [Note: bytes on a ring].
_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
_ALL_SENT = {"send": 1, "recv": 0, "all_to_all": 1}  # bytes sent, in units of the tensor


@dataclass(frozen=True)
class Collective:
    """One collective, as one of its ranks issued it."""

    # all_gather, reduce_scatter, all_reduce, all_to_all, send, recv, or torch's name for any other
    kind: str
    ranks: tuple[int, ...]  # of the group, as global ranks
    dtype: torch.dtype
    # M of [Note: bytes on a ring]; for other kinds, this rank's input, without what it keeps
    full_bytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends on a ring; raises ValueError for kinds without a formula."""
        if self.kind in _ALL_SENT:
            return _ALL_SENT[self.kind] * self.full_bytes
        if self.kind not in _PASSES:
            raise ValueError(f"kind={self.kind} has no formula; these have: {', '.join(_PASSES)}")
        t = len(self.ranks)
        return _PASSES[self.kind] * (t - 1) * self.full_bytes / t


@contextmanager
def record_traffic() -> Iterator[list[Collective]]:
    """Yield a list to which each collective issued inside is appended, in order."""
    traffic: list[Collective] = []
    with _Recorder(traffic):
        yield traffic


class _Recorder(TorchDispatchMode):
    def __init__(self, traffic: list[Collective]) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(argument_type, DTensor) for argument_type in types):
            # DTensor then calls operations on plain tensors, which come here again.
            return NotImplemented
        kwargs = kwargs or {}
        if func.namespace in _NAMESPACES:
            arguments = arguments_by_name(func, args, kwargs)
            # An operation without a group does not communicate: it waits, or wraps a result.
            if any(name in arguments for name in _GROUP_NAMES):
                self.traffic.append(_collective(operator_name(func), arguments))
        return func(*args, **kwargs)


def _collective(name: str, arguments: dict[str, Any]) -> Collective:
    group = next(_group(arguments[name]) for name in _GROUP_NAMES if name in arguments)
    ranks = tuple(dist.get_process_group_ranks(group))
    inputs = next(list(_tensors(arguments[name])) for name in _INPUT_NAMES if name in arguments)
    kind = _kind(name)
    num_bytes = sum(tensor.nbytes for tensor in inputs)
    if kind == "all_gather":  # whose input is a shard
        num_bytes *= len(ranks)
    if kind == "all_to_all":
        kept = arguments["input_split_sizes"][ranks.index(dist.get_rank())]
        num_bytes -= kept * inputs[0].itemsize
    return Collective(kind, ranks, inputs[0].dtype, num_bytes)


def _kind(name: str) -> str:
    """Map torch's variants to one name: _allgather_base_, allgather_, all_gather_into_tensor..."""
    joined = name.replace("_", "")
    kinds = (*_PASSES, *_ALL_SENT)
    return next((k for k in kinds if joined.startswith(k.replace("_", ""))), name.strip("_"))


def _group(argument: Any) -> dist.ProcessGroup:
    """The process group, given by name, boxed for the dispatcher, or as it is."""
    if isinstance(argument, torch.ScriptObject):
        argument = dist.ProcessGroup.unbox(argument)
    # Resolved by name: torch knows the ranks of a group it created, not of one wrapped inside.
    name = argument if isinstance(argument, str) else argument.group_name
    return group_by_name(name)


def _tensors(argument: Any) -> Iterator[Tensor]:
    """The tensors in a tensor or nested lists of them."""
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)


@contextmanager
def fake_mesh(
    num_ranks: int,
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
    overlap: Overlap = "none",
    rank: int = 0,
    **more_axes: Any,
) -> Iterator[Mesh]:
    """Yield the CPU mesh of one rank of `num_ranks`, without the other ranks.

    torch's fake backend returns at once and leaves outputs unset: only shapes, bytes and the order
    of collectives mean anything. Raises RuntimeError if this process has already joined a group.
    """
    if dist.is_initialized():
        raise RuntimeError("fake_mesh needs a process that has not joined a process group")
    init_fake_process_group(num_ranks, rank)
    try:
        with scratch_scope():  # fake tensors must not remain in the scratch memory
            yield make_mesh(
                tensor_model_parallel_size,
                sequence_parallel,
                torch.device("cpu"),
                0,
                overlap=overlap,
                **more_axes,
            )
    finally:
        close_mesh()
        forget_sharding_rules()
