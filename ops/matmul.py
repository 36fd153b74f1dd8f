"""Matmuls in the precision that is fast on this rank's device.

[Note: widening]
A bfloat16 matmul adds products of bfloat16 numbers in float32 and rounds the sum once. GPUs, CPUs
with AMX and AMD's Zen 4 and 5 do that faster than float32. Other CPUs do it slower, some by far
(measured: ops/processor.py). On those, operands are widened to float32, multiplied, and the result
rounded. The product of two bfloat16 numbers is exact in float32, so only the order of the sum
differs. Tensors that are saved or communicated stay bfloat16. All ranks of a run use the same
`Precision`, which its checkpoints record (training/hardware.py).

Logits are not rounded at all: rounding a logit of 20 to bfloat16 costs up to 0.06 nats. A GPU can
return the float32 sum; CPU kernels cannot, so there the head is always widened.
"""

from dataclasses import astuple, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.scratch import take_scratch

Choice = Literal["native", "widened"]


@dataclass(frozen=True)
class Precision:
    """How CPUs compute on bfloat16 tensors: [Note: widening]."""

    matmul: Choice
    attention: Choice

    def __post_init__(self) -> None:
        if not {*astuple(self)} <= {*get_args(Choice)}:
            raise ValueError(f"{self} is not one of {get_args(Choice)}")


class _InUse:
    precision = Precision("widened", "widened")


def use_precision(precision: Precision) -> Precision:
    """Set the precision of this process; returns the previous one."""
    previous, _InUse.precision = _InUse.precision, precision
    return previous


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is multiplied."""
    return _dtype(x, _InUse.precision.matmul)


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which queries, keys and values like x are multiplied."""
    return _dtype(x, _InUse.precision.attention)


def _dtype(x: Tensor, choice: Choice) -> torch.dtype:
    is_widened = choice == "widened" and x.device.type == "cpu" and x.dtype == torch.bfloat16
    return torch.float32 if is_widened else x.dtype


def use_full_precision() -> None:
    """Multiply float32 without TF32, and sum bfloat16 products in float32.

    The first is torch's default except under TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which NVIDIA's
    containers set; by default a GPU may add partial sums in bfloat16.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def widen(x: Tensor, use: str) -> Tensor:
    """Return x in its matmul dtype; a copy is valid until the next call with the same `use`."""
    return x if matmul_dtype(x) == x.dtype else _to_float32(x, use)


def widen_for_fp32(x: Tensor, use: str) -> Tensor:
    """Widen an operand of several `matmul_fp32`, which would otherwise widen it each time."""
    return _to_float32(x, use) if x.device.type == "cpu" else x


def _to_float32(x: Tensor, use: str) -> Tensor:
    if x.dtype != torch.bfloat16:
        return x
    if x.ndim == 2 and x.t().is_contiguous():  # noqa: PLR2004  # a matrix
        return take_scratch(use, x, x.t().shape).copy_(x.t()).t()
    return take_scratch(use, x, x.shape).copy_(x)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a b` in float32 at least, never rounded to bfloat16; valid until the next matmul."""
    if a.device.type == "cpu":
        a, b = _to_float32(a, "left"), _to_float32(b, "right")
        if a.dtype != torch.float32:
            return torch.mm(a, b)
        return torch.mm(a, b, out=take_scratch("product", a, (a.shape[0], b.shape[1])))
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.mm(a, b)


def add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a b`, with `total` in float32 at least and a and b possibly in bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cpu":  # whose kernels round to bfloat16
        total += torch.mm(a, b)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b (+ bias)`, `[m, k]` times `[k, n]`, rounded to the dtype of a. No autograd."""
    if matmul_dtype(a) == a.dtype:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    wide = matmul_fp32(widen(a, "left"), widen(b, "right"))
    return (wide if bias is None else wide.add_(bias)).to(a.dtype)


class _Linear(torch.autograd.Function):
    """Y = X A^T + b.     dX = dY A.     dA = dY^T X.     db = sum of dY over positions.

    Unlike F.linear, it does not save widened operands. With `fp32`, Y is not rounded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fp32: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows, matrix = x.reshape(-1, x.shape[-1]), weight.t()
        # A copy, because the next matmul overwrites the scratch memory.
        y = matmul_fp32(rows, matrix).clone() if fp32 else matmul(rows, matrix, bias)
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
    """`x weight^T` in float32 at least."""
    return (
        _Linear.apply(x, weight, None, True) if x.dtype == torch.bfloat16 else F.linear(x, weight)
    )
