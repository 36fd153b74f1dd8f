"""What this rank's device can do at most, for figures in proportion to it."""

import ctypes
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch

from ops.matmul import matmul_dtype
from parallel import Mesh

# Dense bf16 matmul rates in FLOP/s, from the data sheets: half of those with sparsity. By the full
# name in torch.cuda.get_device_name, because boards of one chip differ in clocks and power.
_DATA_SHEET_BF16 = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H20": 148e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA GH200 480GB": 989.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA B200": 2250e12,
}
_REPEATS = 5
# Float32 weights, gradients and two moments.
_STATE_BYTES_PER_PARAMETER = 16
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_CGROUP = Path("/sys/fs/cgroup")
_LARGE_BYTES, _NEVER_BYTES, _OLD_LIMIT_BYTES = 1 << 20, 1 << 30, 32 << 20


def peak_flops_per_second(device: torch.device, precision: str) -> float:
    """This rank's share of the rate that MFU is a fraction of.

    The data sheet's in bf16 on a known GPU. On other devices, the best measured rate of a product
    of two square matrices, by this rank with its threads, while its peers do the same: in bfloat16
    at the precision in which this processor multiplies it. Whatever else runs at that time lowers
    it, so a measured rate is a lower bound.
    """
    if device.type == "cuda" and precision == "bf16":
        rate = _DATA_SHEET_BF16.get(torch.cuda.get_device_name(device))
        if rate is not None:
            return rate
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192  # a GPU would time its launch
    a = torch.ones(size, size, dtype=dtype, device=device)
    a = a.to(matmul_dtype(a))
    best_s = min(_seconds_of_product(a) for _ in range(_REPEATS))
    return 2 * size**3 / best_s


def device_name(device: torch.device) -> str:
    """The maker's name of a GPU or a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):  # not on every architecture
                return line.partition(":")[2].strip()
    return platform.machine()


def set_up_allocator(mesh: Mesh, num_parameters: int) -> None:
    """Have glibc keep the memory of freed tensors for the next ones, unless memory is short.

    By itself it returns blocks of more than 32 MiB to the system, whose pages then cost a fault
    each when they are next needed: 8 % of a step (docs/performance.md). A run that needs most of
    the machine returns all large ones, as what glibc keeps is more than can be spared.
    """
    if mesh.device.type != "cpu" or sys.platform != "linux":
        return
    hosts = mesh.world.size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    state_bytes = _STATE_BYTES_PER_PARAMETER * num_parameters / hosts
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if container := _container_memory():
        memory_bytes = min(memory_bytes, container[0])
    mallopt = ctypes.CDLL(None).mallopt
    if state_bytes > memory_bytes / 2:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    elif not any(name.startswith("MALLOC_") for name in os.environ):  # somebody's own choice
        # glibc before 2.35 takes no more than half of its heaps' 64 MiB.
        if not mallopt(_M_MMAP_THRESHOLD, _NEVER_BYTES):
            mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never give back the top either


def use_deterministic_kernels() -> None:
    """Have torch take kernels that give the same bits each time, or say so where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Would write over all new memory first; what we make with empty is filled before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def host_memory_allows(num_bytes: int) -> bool:
    """Whether every rank of this host can copy so much to it and leave half of what is free."""
    if sys.platform != "linux":
        return True
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available_bytes = 1024 * int(fields["MemAvailable"].split()[0])
    if container := _container_memory():
        allowed, used = container
        available_bytes = min(available_bytes, allowed - used)
    return num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < available_bytes / 2


def _container_memory() -> tuple[int, int] | None:
    """What a container may have and has, in bytes; None where that is all of its host."""
    limit, used = (_CGROUP / f"memory.{name}" for name in ("max", "current"))
    if not limit.exists() or (allowed := limit.read_text().strip()) == "max":
        return None
    return int(allowed), int(used.read_text())


def _seconds_of_product(a: torch.Tensor) -> float:
    started_at = time.perf_counter()
    _ = a @ a
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started_at


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory so far: allocated on a GPU, resident on a processor."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
