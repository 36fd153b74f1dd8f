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
    """The function; as one kernel if it is to be compiled, made at its first call.

    A kernel gets what it computes with as tensors. The compiler may take a number for a constant or
    for a variable, as settings of the calling thread say; both must give the same result.
    """
    return _compiled(function) if compiles else function


@functools.cache
def _compiled(function: Function) -> Function:
    # Of any size: a batch padded to its longest row has another length each time. The limit is an
    # argument because torch._dynamo.config is of the calling thread, and autograd has its own.
    compiled: Function = torch.compile(  # type: ignore[call-overload]  # a stub lacks the limit
        function, dynamic=True, fullgraph=True, recompile_limit=_MOST_KERNELS
    )
    return compiled


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
