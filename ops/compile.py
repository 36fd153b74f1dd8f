"""Functions of single elements, or of rows of them, as one kernel each.

Run by torch as they are written, such functions read and write memory once for each operation.
torch.compile makes one loop of them, on a processor with the machine's C++ compiler, on a GPU with
Triton. They are pure, so that it can; what surrounds them (products, attention, what crosses the
wire) gains nothing by it and is left alone, which is also why this works on every layout.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

Function = Callable[..., torch.Tensor]

# Of a function in a process. A run needs a few, for precisions and with and without gradients.
_MOST_KERNELS = 64
_ROOM_MIB = 256  # torch 2.13 writes a precompiled header of 147 MiB, and small files


def maybe_compile(function: Function, compile: bool) -> Function:
    """The function; as one kernel if it is to be compiled, made at its first call.

    A kernel gets what it computes with as tensors. The compiler may take a number for a constant or
    for a variable, as settings of the calling thread say; both must give the same result.
    """
    return _compiled(function) if compile else function


@functools.cache
def _compiled(function: Function) -> Function:
    # Of any size: a batch padded to its longest row has another length each time. The limit is an
    # argument because torch._dynamo.config is of the calling thread, and autograd has its own.
    compiled: Function = torch.compile(  # type: ignore[call-overload]  # a stub lacks the limit
        function, dynamic=True, fullgraph=True, recompile_limit=_MOST_KERNELS
    )
    return compiled


def compile_obstacle(device: torch.device) -> str | None:
    """Why kernels cannot be compiled on this machine; None if they can.

    A compiler that works and a cache that can be written to are tried out: the first kernels are
    needed only after the corpus has been prepared.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "there is no triton package"
    # Triton compile what launches its kernels.
    variable, usual = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        return (
            f"there is no compiler ({compiler}; the environment variable {variable} names another)"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"there is no {header} (package python3-dev)"
    try:
        return _try_compiler([compiler, "-shared", "-fPIC", f"-I{header.parent}"])
    except OSError as error:
        return (
            f"{error} ({variable} names another compiler, TORCHINDUCTOR_CACHE_DIR another folder)"
        )


def _try_compiler(command: list[str]) -> str | None:
    """Compile a trivial library in the folder of kernels; raises OSError if that is impossible."""
    # Here: it takes seconds to import.
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # noqa: PLC0415

    cache = cache_dir()
    with tempfile.TemporaryDirectory(prefix="try_", dir=cache) as folder:
        source, library = Path(folder, "try.c"), Path(folder, "try.so")
        source.write_text("#include <Python.h>\n")
        ended = subprocess.run(
            [*command, source, "-o", library], capture_output=True, text=True, check=False
        )
        if ended.returncode or not library.exists():
            said = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(
                f"{command[0]} has failed in {cache}, exit code {ended.returncode}: {said}"
            )
        free_mib = shutil.disk_usage(folder).free >> 20
    return None if free_mib >= _ROOM_MIB else f"{cache} has only {free_mib} of {_ROOM_MIB} MiB free"
