"""The two linear layers of tensor parallelism, each as one function that overlaps communication.

[Note: overlap]
Column-parallel, Y = X A^T with A sharded by rows and, with sequence parallelism, X by positions:

    forward     all-gather X                  then Y = X A^T
    backward    all-gather X again            under dX = dY A
                reduce-scatter dX             under dA = dY^T X

Only the shard of X is saved for backward, 1/t of what the plain layer saves, at the cost of the
second gather. Without sequence parallelism only dX is communicated: an all-reduce under the same
matmul. Row-parallel, Y = X A^T with A sharded by columns and X to match:

    forward     X A^T                         then reduce-scatter Y
    backward    all-gather dY                 then dX = dY A and dA = dY^T X

Here nothing can overlap. The second gather is that of Korthikanti et al. 2022, section 4.2.2.
"""

from typing import Any

import torch
from torch import Tensor

from ops.matmul import matmul
from ops.recompute import save_early
from parallel.collectives import Pending, all_gather, start_all_gather, start_tp_reduce
from parallel.mesh import Mesh


class _ColumnParallel(torch.autograd.Function):
    """Y = X A^T + b.     dX = dY A.     dA = dY^T X.     db = sum of dY over positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.mesh = mesh
        ctx.save_for_backward(x, weight)
        return _multiply(_gather(x, mesh), weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mesh, (x, weight) = ctx.mesh, ctx.saved_tensors
        gathering = start_all_gather(x, mesh.tp) if mesh.sequence_parallel else Pending(x)
        grads, grad_x = _rows(grad), _multiply(grad, weight)  # [s, b, in], a partial sum
        rows = _rows(gathering.wait())
        summing = start_tp_reduce(grad_x, mesh)
        _, _, needs_weight, needs_bias = ctx.needs_input_grad
        grad_weight = matmul(grads.t(), rows) if needs_weight else None
        grad_bias = grads.sum(dim=0) if needs_bias else None
        return summing.wait(), None, grad_weight, grad_bias


class _RowParallel(torch.autograd.Function):
    """Y = sum over ranks of X A^T.     dX = dY A.     dA = dY^T X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, weight: Tensor) -> Tensor:
        ctx.mesh = mesh
        # Before the communication, so that recomputing the block stops here and skips it.
        ctx.saved = save_early(x, weight)
        return start_tp_reduce(_multiply(x, weight.t()), mesh).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), ctx.saved = ctx.saved(), None
        grad = _gather(grad, ctx.mesh)
        grad_x = _multiply(grad, weight)
        grad_weight = matmul(_rows(grad).t(), _rows(x)) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_weight


def column_parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh) -> Tensor:
    """`gather(x) A^T + b` for `A` `[out/t, in]`; x `[s/t, b, in]`, result `[s, b, out/t]`.

    Equal to `enter_tensor_parallel_region` followed by a matmul.
    """
    return _ColumnParallel.apply(x, mesh, weight, bias)


def row_parallel_linear(x: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
    """Sum `x A^T` over ranks; x `[s, b, in/t]`, `A` `[out, in/t]`, result `[s/t, b, out]`.

    Equal to a matmul followed by `exit_tensor_parallel_region`.
    """
    return _RowParallel.apply(x, mesh, weight)


def _gather(x: Tensor, mesh: Mesh) -> Tensor:
    """`[s/t, b, k]` to `[s, b, k]` with sequence parallelism."""
    return all_gather(x, mesh.tp) if mesh.sequence_parallel else x


def _multiply(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[s, b, k]` times `[k, n]` (+ bias)."""
    return matmul(_rows(x), matrix, bias).view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    """`[s, b, k]` to `[s b, k]`."""
    return x.reshape(-1, x.shape[-1])
