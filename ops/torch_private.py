"""The private APIs of torch that training uses; torch_dry_run.py has those of dry runs.

No other file names one. All were tried with torch 2.11.0, 2.13.0 and 2.14.1;
tests/ops/test_torch_private.py checks each.
"""

import functools
import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # type: ignore[attr-defined]  # one is not declared
    ProcessGroupGloo,
    _create_work_from_future,
    _resolve_process_group,
)
from torch.distributed.distributed_c10d import GroupName

__all__ = ["ProcessGroupGloo"]  # does what a group that shares memory does not

# Attention that returns what its backward needs, so that the caller chooses what to save.
flash_attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_attention_on_cpu_backward = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
)
flash_attention_on_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default
flash_attention_on_cuda_backward = (
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default
)
# Variable length: `[positions, a, d]`, and where each sequence begins.
flash_varlen_on_cuda = torch.ops.aten._flash_attention_forward.default
flash_varlen_on_cuda_backward = torch.ops.aten._flash_attention_backward.default
efficient_attention_on_cuda = torch.ops.aten._scaled_dot_product_efficient_attention.default
efficient_attention_on_cuda_backward = (
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
)
# One kernel for many gradients.
foreach_copy_, foreach_mul_, foreach_norm = (
    torch._foreach_copy_,
    torch._foreach_mul_,
    torch._foreach_norm,
)

# Collectives on one tensor, and the methods of a process group that they call. torch 2.11 has the
# older names.
_NEW_NAMES = hasattr(dist, "all_gather_single")
all_gather_single = dist.all_gather_single if _NEW_NAMES else dist.all_gather_into_tensor
reduce_scatter_single = dist.reduce_scatter_single if _NEW_NAMES else dist.reduce_scatter_tensor
ALL_GATHER = "all_gather_single" if _NEW_NAMES else "_allgather_base"
REDUCE_SCATTER = "reduce_scatter_single" if _NEW_NAMES else "_reduce_scatter_base"
# The other collectives that a Python process group can override.
OTHER_COLLECTIVES = tuple(
    name
    for name in (
        *("allgather", "allreduce_coalesced", "barrier", "broadcast", "reduce_scatter"),
        *("recv", "send", "all_to_all_single", "alltoall_base"),
        *("all_gather_single_coalesced", "allgather_into_tensor_coalesced"),
        *("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
    )
    if hasattr(dist.ProcessGroup, name)
)


def current_saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """The innermost pack and unpack hooks, the only ones that torch runs; else identities."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks or ((lambda tensor: tensor), (lambda saved: saved))


def storage_id(tensor: Tensor) -> int:
    """Identify a storage while it exists; fake and meta tensors have no address in memory."""
    return tensor.untyped_storage()._cdata


def compile_with_limit(function: Callable[..., Tensor], limit: int) -> Callable[..., Tensor]:
    """Compile for dynamic shapes, without graph breaks, and recompile up to `limit` times.

    Settings of torch 2.13 do not reach autograd's threads, so the limit is an argument; torch 2.11
    has only a setting, which all threads share.
    """
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = limit
    else:
        from torch._dynamo import config  # noqa: PLC0415  # takes seconds

        config.recompile_limit = limit
    return torch.compile(function, **options)


def kernel_cache_dir() -> str:
    """The directory where torch.compile writes kernels; created if missing."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # noqa: PLC0415  # takes seconds

    return cache_dir()


def make_gloo(store: Any, rank: int, size: int, timeout: timedelta) -> ProcessGroupGloo:
    """A gloo group whose messages arrive in one thread that all groups of this process share.

    Otherwise each group has such a thread, which wakes up 100 times per second.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # undeclared
    options._devices, options._timeout = _gloo_devices(), timeout
    options._threads = 2 * len(options._devices)
    return ProcessGroupGloo(store, rank, size, options)


@functools.cache
def _gloo_devices() -> list[Any]:
    """Those that torch would choose."""
    if interfaces := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
    return [ProcessGroupGloo.create_default_device()]


def register_backend(group: dist.ProcessGroup, backend: Any, name: str | None = None) -> None:
    """Let a group use a gloo backend for CPU tensors, and set the name of the group."""
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    if name is not None:
        group._set_group_name(GroupName(name))


def group_by_name(name: str) -> dist.ProcessGroup:
    """Find a process group by the name that operators get."""
    return _resolve_process_group(GroupName(name))


def completed_work(tensors: list[Tensor]) -> dist.Work:
    """The handle of a collective that is complete."""
    future: Any = torch.futures.Future()
    future.set_result(tensors)
    return _create_work_from_future(future)
