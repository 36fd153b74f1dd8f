"""Compile pointwise and row-wise functions with torch.compile, one kernel each.

Eager torch reads and writes memory once per operation. Matmuls, attention and communication gain
nothing from compilation and are left alone, which is also why this works on every layout.
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

from ops.torch_private import compile_with_limit, kernel_cache_dir

Function = Callable[..., torch.Tensor]

_RECOMPILE_LIMIT = 64  # per function; a run needs a few, for dtypes and with or without gradients
_MIN_FREE_MIB = 256  # torch 2.13 writes a precompiled header of 147 MiB, and small files


def maybe_compile(function: Function, compile: bool) -> Function:
    """Return the function, compiled at its first call if `compile`.

    Pass the numbers that a kernel computes with as tensors: the compiler may treat a number as a
    constant or as a variable, depending on settings of the calling thread.
    """
    return _compiled(function) if compile else function


@functools.cache
def _compiled(function: Function) -> Function:
    return compile_with_limit(function, _RECOMPILE_LIMIT)


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work on this machine; None if it can.

    Tries the compiler and the cache directory now, because the first kernel is needed only after
    the corpus has been prepared.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    # Triton compiles C launchers for its kernels.
    variable, default = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    try:
        return _try_compiler(os.environ.get(variable, default))
    except OSError as error:
        return (
            f"{error} (install a compiler and the Python headers, set {variable} to another "
            "compiler, or TORCHINDUCTOR_CACHE_DIR to another directory)"
        )


def _try_compiler(compiler: str) -> str | None:
    """Compile a trivial extension in the kernel cache; raises OSError if that fails."""
    cache = kernel_cache_dir()
    with tempfile.TemporaryDirectory(prefix="try_", dir=cache) as folder:
        source, library = Path(folder, "try.c"), Path(folder, "try.so")
        source.write_text("#include <Python.h>\n")
        include = f"-I{sysconfig.get_path('include')}"
        command = [compiler, "-shared", "-fPIC", include, str(source), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not library.exists():
            error = (result.stderr.strip().splitlines() or ["no message"])[0]
            raise OSError(f"{compiler} failed in {cache}, exit code {result.returncode}: {error}")
        free_mib = shutil.disk_usage(folder).free >> 20
    return None if free_mib >= _MIN_FREE_MIB else f"{cache} has only {free_mib} MiB free"
