"""What crosses the wire, counted: one record for each collective that this process issues.

Every collective passes torch's dispatcher, whoever asks for it: our mappings, FSDP2, a DTensor, in
forward or in backward. A dispatch mode sees it there, writes down what it is and lets it pass.

[Note: bytes on a ring]
Let M be the bytes of the full tensor: as gathered, before it is scattered, or as reduced. On a ring
of t ranks an all-gather or a reduce-scatter takes t - 1 rounds, in each of which a rank passes M/t
on to its neighbour. An all-reduce is the one after the other (Thakur et al. 2005):

    all-gather, reduce-scatter      (t - 1) / t M
    all-reduce                    2 (t - 1) / t M

What a backend does may differ; this is the measure by which layouts are compared.

[Note: pretended ranks]
`fake_mesh` is a mesh of which only this process exists. torch's "fake" backend returns at once
and leaves what was to be received as it was. Nothing computed on it means anything; shapes, bytes
and the order of collectives do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it makes the backend
from torch.utils._python_dispatch import TorchDispatchMode

from ops.matmul import scratch_scope
from parallel.mesh import Mesh, Overlap, close_mesh, make_mesh

# The same three collectives have several names: of calls on one tensor, on lists of tensors, and
# of DTensor's own (namespace _c10d_functional). Names of torch 2.13.
_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
}
# torch's own, and that of backend.py.
_NAMESPACES = ("c10d", "_c10d_functional", "microtron")
_INPUT_NAMES = ("input_tensor", "input_tensors", "input", "inputs", "tensor", "tensors")
_GROUP_NAMES = ("process_group", "group_name")
# Times M, in units of (t - 1) / t: see [Note: bytes on a ring].
_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


@dataclass(frozen=True)
class Collective:
    """One collective, as one of its ranks issued it."""

    kind: str  # all_gather, reduce_scatter or all_reduce; any other has torch's name for it
    ranks: tuple[int, ...]  # of the group, numbered over all ranks
    dtype: torch.dtype
    full_bytes: int  # M of [Note: bytes on a ring]; of any other kind, what this rank puts in

    @property
    def group_size(self) -> int:
        """Ranks that take part, t."""
        return len(self.ranks)

    @property
    def sent_bytes(self) -> float:
        """What this rank sends on a ring.

        Raises ValueError for a kind that [Note: bytes on a ring] has no formula for.
        """
        if self.kind not in _PASSES:
            raise ValueError(f"kind={self.kind} has no formula; these have: {', '.join(_PASSES)}")
        return _PASSES[self.kind] * (self.group_size - 1) * self.full_bytes / self.group_size


@contextmanager
def record_traffic() -> Iterator[list[Collective]]:
    """Record the collectives that this process issues inside; results are as without.

    Yields a list, empty at first, that grows in the order in which they are issued.
    """
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
        if any(issubclass(of_argument, DTensor) for of_argument in types):
            # A mode does not see what runs inside a call that it passes on. Declined, a DTensor's
            # operation becomes operations on plain tensors, and those come here again.
            return NotImplemented
        kwargs = kwargs or {}
        if func.namespace in _NAMESPACES:
            names = (argument.name for argument in func._schema.arguments)
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            # Without a group it does not communicate: it waits, or it wraps a result.
            if any(name in arguments for name in _GROUP_NAMES):
                self.traffic.append(_collective(func._opname, arguments))
        return func(*args, **kwargs)


def _collective(name: str, arguments: dict[str, Any]) -> Collective:
    group = next(_group(arguments[name]) for name in _GROUP_NAMES if name in arguments)
    ranks = tuple(dist.get_process_group_ranks(group))
    inputs = next(list(_tensors(arguments[name])) for name in _INPUT_NAMES if name in arguments)
    kind = _KINDS.get(name, name.strip("_"))
    num_bytes = sum(tensor.nbytes for tensor in inputs)
    if kind == "all_gather":  # what goes in is a shard
        num_bytes *= len(ranks)
    return Collective(kind, ranks, inputs[0].dtype, num_bytes)


def _group(argument: Any) -> dist.ProcessGroup:
    """The process group, which comes as its name, boxed for the dispatcher, or as it is."""
    if isinstance(argument, torch.ScriptObject):
        argument = dist.ProcessGroup.unbox(argument)
    # By its name, as torch knows the ranks of a group that it has made, not of one inside it.
    name = argument if isinstance(argument, str) else argument.group_name
    return torch._C._distributed_c10d._resolve_process_group(GroupName(name))


def _tensors(argument: Any) -> Iterator[Tensor]:
    """The tensors of an argument that is one, a list of them or a list of lists."""
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
) -> Iterator[Mesh]:
    """The mesh of rank 0 of `num_ranks`, on processors, with nobody to talk to.

    Raises RuntimeError if this process has joined a group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process that has joined a group of ranks cannot pretend another one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        with scratch_scope():  # tensors without contents must not stay behind in it
            yield make_mesh(
                tensor_model_parallel_size, sequence_parallel, torch.device("cpu"), 0, overlap
            )
    finally:
        close_mesh()
