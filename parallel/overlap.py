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

Here nothing can overlap unless the positions are processed in chunks: then the gather of the next
chunk hides under the matmul of this one, and the reduce-scatter of a finished chunk under the
matmul of the next. Every rank's shard is chunked alike, so a chunk of the gathered tensor has some
positions of each rank. `overlap="both"` does this in both layers, in both directions. It makes
matmuls and messages smaller, so it is for slow networks.

Sources: Korthikanti et al. 2022, section 4.2.2 (gathering the shard again); Wang et al. 2023,
"Overlap Communication with Dependent Computation via Decomposition" (chunks).
"""

from typing import Any

import torch
from torch import Tensor

from ops.matmul import matmul
from ops.recompute import save_early
from parallel.collectives import (
    Pending,
    all_gather,
    start_all_gather,
    start_reduce_scatter,
    start_tp_reduce,
)
from parallel.mesh import Mesh

_NUM_CHUNKS = 4  # of each shard, where both directions overlap


class _ColumnParallel(torch.autograd.Function):
    """Y = X A^T + b.     dX = dY A.     dA = dY^T X.     db = sum of dY over positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.mesh = mesh
        ctx.save_for_backward(x, weight)
        return _gather_and_multiply(x, weight.t(), bias, mesh)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mesh, (x, weight) = ctx.mesh, ctx.saved_tensors
        gathering = start_all_gather(x, mesh.tp) if mesh.sequence_parallel else Pending(x)
        grads = _rows(grad)
        grad_x = matmul(grads, weight).view(*grad.shape[:-1], -1)  # [s, b, in], a partial sum
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
        return _multiply_and_sum(x, weight.t(), mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), ctx.saved = ctx.saved(), None
        grad_x, grad = _gather_and_multiply(grad, weight, None, ctx.mesh)
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


def _gather_and_multiply(
    x: Tensor, matrix: Tensor, bias: Tensor | None, mesh: Mesh
) -> tuple[Tensor, Tensor]:
    """Gather x `[s/t, b, k]`; returns its product with the matrix `[k, n]`, and gathered x."""
    num_chunks = _num_chunks(x.shape[0], mesh)
    if num_chunks == 1:
        gathered = all_gather(x, mesh.tp) if mesh.sequence_parallel else x
        return matmul(_rows(gathered), matrix, bias).view(*gathered.shape[:-1], -1), gathered
    # [t, chunks, positions of a chunk, b, ...]; flattened, it is [s, b, ...] in order.
    shape = (mesh.tp.size, num_chunks, x.shape[0] // num_chunks, x.shape[1])
    gathered, output = x.new_empty(*shape, x.shape[2]), x.new_empty(*shape, matrix.shape[1])
    chunks = x.chunk(num_chunks)
    gathering = start_all_gather(chunks[0], mesh.tp)
    for number in range(num_chunks):
        chunk = gathering.wait()
        if number + 1 < num_chunks:
            gathering = start_all_gather(chunks[number + 1], mesh.tp)
        gathered[:, number] = chunk.view_as(gathered[:, number])
        product = matmul(_rows(chunk), matrix, bias)
        output[:, number] = product.view_as(output[:, number])
    return output.flatten(0, 2), gathered.flatten(0, 2)


def _multiply_and_sum(x: Tensor, matrix: Tensor, mesh: Mesh) -> Tensor:
    """Multiply x `[s, b, k]` by the matrix `[k, n]` and sum over ranks, to `[s/t, b, n]`."""
    num_chunks = _num_chunks(x.shape[0] // mesh.tp.size, mesh)
    if num_chunks == 1:
        y = matmul(_rows(x), matrix).view(*x.shape[:-1], -1)
        return start_tp_reduce(y, mesh).wait()
    chunks = x.unflatten(0, (mesh.tp.size, num_chunks, -1))
    summing = []
    for number in range(num_chunks):
        chunk = chunks[:, number].flatten(0, 1)  # [positions, b, k], some of each rank's
        y = matmul(_rows(chunk), matrix).view(*chunk.shape[:-1], -1)
        summing.append(start_reduce_scatter(y, mesh.tp))
    return torch.cat([chunk.wait() for chunk in summing])


def _num_chunks(shard_size: int, mesh: Mesh) -> int:
    can_split = mesh.sequence_parallel and shard_size % _NUM_CHUNKS == 0
    return _NUM_CHUNKS if mesh.overlap == "both" and can_split else 1


def _rows(x: Tensor) -> Tensor:
    """`[s, b, k]` to `[s b, k]`."""
    return x.reshape(-1, x.shape[-1])
