"""Matrix products, in the precision in which this rank's device is fast.

[Note: bfloat16 without units for it]
A product of bfloat16 matrices adds up products of bfloat16 numbers in float32 and rounds the sum
once. A GPU, and a processor with AMX, has units that do so much faster than float32. Other x86
processors only have instructions that are slower than float32 (measured on a Xeon with
avx512_bf16: half the rate). There the operands are widened to float32, multiplied, and the result
is rounded. The product of two bfloat16 numbers is exact in float32, so the sum is the same but for
the order of its terms; what is kept for backward and what is sent stays bfloat16.

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


def operand_dtype(x: Tensor) -> torch.dtype:
    """The precision in which x is multiplied: [Note: bfloat16 without units for it]."""
    lacks_units = x.device.type == "cpu" and not _has_bfloat16_units()
    return torch.float32 if x.dtype == torch.bfloat16 and lacks_units else x.dtype


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
def own_scratch() -> Iterator[dict[str, Tensor]]:
    """Inside, scratch memory is apart from that outside, and counted: the tensors by use."""
    outside, _scratch.memory = _scratch.memory, {}
    try:
        yield _scratch.memory
    finally:
        _scratch.memory = outside


def as_operand(x: Tensor, use: str) -> Tensor:
    """x in the precision in which it is multiplied: itself, or a copy in scratch memory.

    The copy has x's order of dimensions, and is good until the next call with the same `use`.
    """
    if operand_dtype(x) == x.dtype:
        return x
    if x.ndim == 2 and x.t().is_contiguous():  # noqa: PLR2004  # a matrix
        return _scratch.take(use, x, x.t().shape).copy_(x.t()).t()
    return _scratch.take(use, x, x.shape).copy_(x)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of two operands, in float32 at least; good until the next product."""
    if a.dtype == torch.float32 and a.device.type == "cpu":
        return torch.mm(a, b, out=_scratch.take("product", a, (a.shape[0], b.shape[1])))
    return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b (+ bias)`, `[m, k]` times `[k, n]`, rounded to a's precision. No autograd."""
    if operand_dtype(a) == a.dtype:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    wide = product_in_float32(as_operand(a, "left"), as_operand(b, "right"))
    return (wide if bias is None else wide.add_(bias)).to(a.dtype)


class _WidenedLinear(torch.autograd.Function):
    """Y = X A^T + b.     dX = dY A.     dA = dY^T X.     db = sum of dY over positions.

    As F.linear, but the widened operands are not kept for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = multiply(x.reshape(-1, x.shape[-1]), weight.t(), bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = grad.reshape(-1, grad.shape[-1])
        grad_x = multiply(grads, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = multiply(grads.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, `[..., in]` to `[..., out]`, `weight` `[out, in]`."""
    if operand_dtype(x) != x.dtype:
        return _WidenedLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
