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
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

Function = Callable[..., torch.Tensor]

# Of a function in a process. A run needs a few, for precisions and with and without gradients.
_MOST_KERNELS = 64


def fused(function: Function, compiles: bool) -> Function:
    """The function; as one kernel if it is to be compiled, made at its first call."""
    return _compiled(function) if compiles else function


@functools.cache
def _compiled(function: Function) -> Function:
    # Numbers with a point are constants, each with a kernel of its own. As variables, torch 2.13
    # computes int(rate * 2**32) once and takes the kernel, by its cache on disk, for any rate.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = _MOST_KERNELS
    # Of any size: a batch padded to its longest row has another length each time.
    return torch.compile(function, dynamic=True, fullgraph=True)


def why_not_compile(device: torch.device) -> str | None:
    """What is missing on this machine for kernels to be compiled; None: nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "there is no triton package"
    # Triton compiles what launches its kernels.
    variable, usual = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    compiler = os.environ.get(variable, usual)
    if shutil.which(compiler) is None:
        return (
            f"there is no compiler ({compiler}; the environment variable {variable} names another)"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"there is no {header} (package python3-dev)"
