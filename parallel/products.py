"""Matrix products, in the precision in which this rank's device is fast.

[Note: bfloat16 without units for it]
A product of bfloat16 matrices adds up products of bfloat16 numbers in float32 and rounds the sum
once. A GPU, and a processor with AMX, has units that do so much faster than float32. Other x86
processors only have instructions that are slower than float32 (measured on a Xeon with
avx512_bf16: half the rate). There the operands are widened to float32, multiplied, and the result
is rounded. The product of two bfloat16 numbers is exact in float32, so the sum is the same but for
the order of its terms; what is kept for backward and what is sent stays bfloat16.
"""

import functools
import platform
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


def is_widened(x: Tensor) -> bool:
    """Whether x takes part in products as float32: [Note: bfloat16 without units for it]."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _has_bfloat16_units()


def as_operand(x: Tensor) -> Tensor:
    """x in the precision in which it is multiplied."""
    return x.float() if is_widened(x) else x


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b (+ bias)`, `[m, k]` times `[k, n]`, rounded to a's precision. No autograd."""
    wide_a, wide_b = as_operand(a), as_operand(b)
    if bias is None:
        return torch.mm(wide_a, wide_b).to(a.dtype)
    return torch.addmm(as_operand(bias), wide_a, wide_b).to(a.dtype)


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
    if is_widened(x):
        return _WidenedLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
