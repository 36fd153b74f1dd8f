"""The device, memory and allocator of this rank, and the bf16 precision of all ranks."""

import contextlib
import ctypes
import json
import logging
import os
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoints import Checkpoint
from configs import Config, os_error_text
from data.cache import locked, replace_durably
from ops.matmul import Precision, matmul_dtype, use_precision
from ops.processor import choice_before_manifests, known_choice, measure_precision, processor
from parallel import Mesh, gather_json

logger = logging.getLogger("microtron")

# Dense bf16 matmul rates in FLOP/s from the data sheets (half of the sparse ones). The keys are
# full torch.cuda.get_device_name, because boards with the same chip differ in clocks and power.
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
_STATE_BYTES_PER_PARAMETER = 16  # float32 weights, gradients and two moments
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGE_BYTES, _NEVER_BYTES, _OLD_LIMIT_BYTES = 1 << 20, 1 << 30, 32 << 20
_CGROUP, _CACHED_FILES = Path("/sys/fs/cgroup"), ("inactive_file ", "active_file ")


def peak_flops_per_second(device: torch.device, precision: str) -> float:
    """The peak matmul rate of this rank, which MFU is relative to.

    On a known GPU in bf16, the data sheet's. Otherwise the best measured rate of a square matmul,
    on all ranks at once; other load lowers it.
    """
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        if name in _DATA_SHEET_BF16:
            return _DATA_SHEET_BF16[name]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 1024 if device.type == "cpu" else 8192  # a GPU would time its launch
    a = torch.ones(size, size, dtype=dtype, device=device)
    a = a.to(matmul_dtype(a))
    return 2 * size**3 / min(_seconds_of_product(a) for _ in range(_REPEATS))


def _seconds_of_product(a: torch.Tensor) -> float:
    started_at = time.perf_counter()
    _ = a @ a
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started_at


def device_name(device: torch.device) -> str:
    """The model name of a GPU or CPU."""
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if is_gpu else processor().name


def choose_precision(
    config: Config, mesh: Mesh, checkpoint: Checkpoint | None = None
) -> Precision | None:
    """Set and return how all ranks compute bf16 on CPUs; None if they do not.

    A resume keeps its checkpoint's precision, to repeat bit for bit; otherwise rank 0's fastest.
    """
    chosen = _recorded_precision(checkpoint) if checkpoint else None
    if chosen is None and mesh.device.type == "cpu" and config.train.precision == "bf16":
        is_first, cache = mesh.world.rank == 0, config.data.cache_directory
        fastest = asdict(fastest_precision(cache)) if is_first else None
        reports = gather_json(mesh, [processor().name, fastest])
        chosen = Precision(**reports[0][1])
        names = sorted({name for name, _ in reports})
        if is_first and len(names) > 1:
            text = "ranks run on different processors (%s); all use the precision of rank 0's: %s"
            logger.warning(text, ", ".join(names), chosen)
    if chosen is not None:
        use_precision(chosen)
    return chosen


def fastest_precision(cache_directory: str) -> Precision:
    """The fastest precision of this processor; processors.json in the cache stores measurements."""
    cpu = processor()
    if (choice := known_choice(cpu)) is not None:
        return Precision(choice, choice)
    path = Path(cache_directory).expanduser() / "processors.json"
    key = f"{cpu.name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    stored: dict[str, Any] = {}
    try:
        with locked([path]):  # runs that start together measure once
            # The file may be missing or damaged.
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
                stored = dict(json.loads(path.read_bytes()))
            with contextlib.suppress(KeyError, TypeError, ValueError):
                return Precision(**stored[key])
            stored[key] = asdict(measure_precision())
            logger.info("measured bf16 on %s: %s", key, stored[key])
            replace_durably(path, json.dumps(stored, indent=1).encode())
    except OSError as error:
        text = "cannot store which precision is faster for bf16; every start measures it: %s: %s"
        logger.warning(text, path, os_error_text(error))
    return Precision(**stored[key]) if key in stored else measure_precision()


def _recorded_precision(checkpoint: Checkpoint) -> Precision | None:
    state = checkpoint.state
    if "matmul_precision" in state:
        choices = state["matmul_precision"], state["attention_precision"]
        return Precision(*choices) if all(choices) else None
    is_imported = state["data_fingerprint"] is None  # not trained yet
    if is_imported or state["config"]["train.precision"] != "bf16":
        return None
    choice = choice_before_manifests(processor())
    return Precision(choice, choice)


def hardware_record(mesh: Mesh, precision: Precision | None) -> dict[str, Any]:
    """What decides the rounding of a step, for the manifest."""
    return {
        "matmul_precision": precision and precision.matmul,
        "attention_precision": precision and precision.attention,
        "processor": device_name(mesh.device),
        "threads_per_rank": torch.get_num_threads() if mesh.device.type == "cpu" else None,
    }


def report_other_hardware(mesh: Mesh, checkpoint: Checkpoint) -> None:
    """Log one line if a resume has another processor or another number of threads."""
    now, state = hardware_record(mesh, None), checkpoint.state
    changes = [
        f"{key}={now[key]} (was {state[key]})"
        for key in ("processor", "threads_per_rank")
        if state.get(key, now[key]) != now[key]
    ]
    if changes and mesh.world.rank == 0:
        logger.warning("this resume may not be bit-identical: %s", ", ".join(changes))


def set_up_allocator(mesh: Mesh, num_parameters: int) -> None:
    """Let glibc keep the memory of freed tensors, unless the run needs most of the machine's.

    By default it returns blocks above 32 MiB to the system, and page faults at their next use cost
    8 % of a step (docs/results.md).
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
    elif not any(name.startswith("MALLOC_") for name in os.environ):  # the user's choice
        # glibc before 2.35 accepts at most half of its heaps' 64 MiB.
        if not mallopt(_M_MMAP_THRESHOLD, _NEVER_BYTES):
            mallopt(_M_MMAP_THRESHOLD, _OLD_LIMIT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never return the top either


def use_deterministic_kernels() -> None:
    """Make torch use kernels that repeat bit for bit, or raise where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    # Filling new memory costs time, and we write all of it before we read it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def host_memory_allows(num_bytes: int) -> bool:
    """Whether all ranks of this host can copy this much and leave half of its free memory."""
    if sys.platform != "linux":
        return True
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available_bytes = 1024 * int(fields["MemAvailable"].split()[0])
    if container := _container_memory():
        allowed, used = container
        available_bytes = min(available_bytes, allowed - used)
    return num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < available_bytes / 2


def _container_memory() -> tuple[int, int] | None:
    """The limit and use of a container's memory without cached files; None without a limit."""
    limit, used, stat = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.exists() or (allowed := limit.read_text().strip()) == "max":
        return None
    lines = stat.read_text().splitlines() if stat.exists() else []
    cached = [int(line.split()[1]) for line in lines if line.startswith(_CACHED_FILES)]
    return int(allowed), int(used.read_text()) - sum(cached)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts in KiB
