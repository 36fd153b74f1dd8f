"""The private APIs of torch that dry runs use, beside torch_private.py."""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import _sharding_prop
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensor",  # dry runs have tensors without memory
    "FakeTensorMode",  # and compute with them under this mode
    "TorchDispatchMode",  # sees every operation: the log of memory and traffic
]

# The operators behind `tensor.item()` and `tensor.to(dtype)`, to recognise them in a dispatch mode.
ITEM = torch.ops.aten._local_scalar_dense.default
CAST = torch.ops.aten._to_copy.default


def call_after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is running."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def init_fake_process_group(num_ranks: int, rank: int = 0) -> None:
    """Be one of `num_ranks` whose collectives return at once, for dry runs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415  # registers

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)


def forget_sharding_rules() -> None:
    """Clear DTensor's caches, which may return the mesh of an earlier fake process group."""
    _clear_sharding_prop_cache()


def arguments_by_name(operator: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Map the arguments of a dispatch mode, positional ones too, to their names."""
    names = (argument.name for argument in operator._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **(kwargs or {})}


def operator_name(operator: Any) -> str:
    """The name of an operator without namespace and overload."""
    return operator._opname


def is_sharding_rule() -> bool:
    """Whether DTensor is propagating shapes, for which it creates global tensors."""
    frame = sys._getframe().f_back
    while frame is not None and frame.f_globals is not vars(_sharding_prop):
        frame = frame.f_back
    return frame is not None
