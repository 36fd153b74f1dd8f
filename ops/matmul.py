"""Matrix products, in the precision in which this rank's device is fast.

[Note: bfloat16 without units for it]
A product of bfloat16 matrices adds up products of bfloat16 numbers in float32 and rounds the sum
once. A GPU, and a processor with AMX, has units that do so much faster than float32. Other x86
processors only have instructions that are slower than float32 (measured on a Xeon with
avx512_bf16: half the rate). There the operands are widened to float32, multiplied, and the result
is rounded. The product of two bfloat16 numbers is exact in float32, so the sum is the same but for
the order of its terms; what is kept for backward and what is sent stays bfloat16.

The head's logits are not rounded at all: a logit of 20 in bfloat16 is up to 0.06 nats away. A GPU
gives the float32 sum itself; a processor's kernels do not, so there the head is always widened.

[Note: scratch]
Widened operands and the product before its rounding live for one call, between tensors that are
kept for backward. Allocated there, each would leave a hole that the next kept tensor, of half its
size, spoils for the next product: half of a step's memory was holes. So they have memory of their
own, as large as the largest needs it.
"""

import functools
import math
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def _has_bfloat16_units() -> bool:
    """Whether this processor multiplies faster in bfloat16 than in float32.

    A fact of the machine and not a measurement, so that a run that is resumed here repeats to the
    bit. Processors that are not x86 are left to torch.
    """
    return platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_amx_tile_supported()


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The precision in which x is multiplied: [Note: bfloat16 without units for it]."""
    lacks_units = x.device.type == "cpu" and not _has_bfloat16_units()
    return torch.float32 if x.dtype == torch.bfloat16 and lacks_units else x.dtype


def use_full_precision() -> None:
    """Have torch multiply float32 as float32, and add up products of bfloat16 in float32.

    The first is torch's default but for TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which NVIDIA's
    containers set; by the second's default a GPU may add partial sums in bfloat16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


class _Scratch(threading.local):
    """Float32 memory of a processor, by use; what it holds is good until the use comes again."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def take(self, use: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Uninitialised and contiguous, on the device of `like`."""
        size = math.prod(shape)
        if use not in self.memory or self.memory[use].numel() < size:
            self.memory.pop(use, None)  # before there is the larger one
            self.memory[use] = like.new_empty(size, dtype=torch.float32)
        return self.memory[use][:size].view(shape)


_scratch = _Scratch()


@contextmanager
def scratch_scope() -> Iterator[dict[str, Tensor]]:
    """Inside, scratch memory is apart from that outside, and counted: the tensors by use."""
    outside, _scratch.memory = _scratch.memory, {}
    try:
        yield _scratch.memory
    finally:
        _scratch.memory = outside


def widen(x: Tensor, use: str) -> Tensor:
    """x in the precision in which it is multiplied: itself, or a copy in scratch memory.

    The copy has x's order of dimensions, and is good until the next call with the same `use`.
    """
    return x if matmul_dtype(x) == x.dtype else _widened(x, use)


def _widened(x: Tensor, use: str) -> Tensor:
    """A float32 copy of x in scratch memory, or x where it is float32 or wider."""
    if x.dtype != torch.bfloat16:
        return x
    if x.ndim == 2 and x.t().is_contiguous():  # noqa: PLR2004  # a matrix
        return _scratch.take(use, x, x.t().shape).copy_(x.t()).t()
    return _scratch.take(use, x, x.shape).copy_(x)


def widen_exactly(x: Tensor, use: str) -> Tensor:
    """x as `matmul_fp32` multiplies it, for one that it multiplies several times."""
    return _widened(x, use) if x.device.type == "cpu" else x


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a b` in float32 at least, never rounded to bfloat16; good until the next product.

    A processor's kernels round to the precision of the operands, so there those are widened.
    """
    if a.device.type == "cpu":
        a, b = _widened(a, "left"), _widened(b, "right")
        if a.dtype != torch.float32:
            return torch.mm(a, b)
        return torch.mm(a, b, out=_scratch.take("product", a, (a.shape[0], b.shape[1])))
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.mm(a, b)


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b`, where total is of float32 at least, and a and b perhaps of bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":  # whose kernels round to bfloat16
        total += torch.mm(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b (+ bias)`, `[m, k]` times `[k, n]`, rounded to a's precision. No autograd."""
    if matmul_dtype(a) == a.dtype:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    wide = matmul_fp32(widen(a, "left"), widen(b, "right"))
    return (wide if bias is None else wide.add_(bias)).to(a.dtype)


class _Linear(torch.autograd.Function):
    """Y = X A^T + b.     dX = dY A.     dA = dY^T X.     db = sum of dY over positions.

    As F.linear, but widened operands are not kept for backward, and Y may be `exact`: not rounded
    to the precision of X.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, exact: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows, matrix = x.reshape(-1, x.shape[-1]), weight.t()
        # A copy, because the next product is written over this one.
        y = matmul_fp32(rows, matrix).clone() if exact else matmul(rows, matrix, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
        grad_x = matmul(grads, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = matmul(grads.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(dim=0)
        return grad_x, grad_weight, grad_bias, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, `[..., in]` to `[..., out]`, `weight` `[out, in]`."""
    if matmul_dtype(x) != x.dtype:
        return _Linear.apply(x, weight, bias, False)
    return F.linear(x, weight, bias)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` as `linear`, but in float32 at least."""
    return (
        _Linear.apply(x, weight, None, True) if x.dtype == torch.bfloat16 else F.linear(x, weight)
    )
