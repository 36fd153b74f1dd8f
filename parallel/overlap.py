"""The two linear layers of tensor parallelism as one function each: they send while they multiply.

[Note: what hides under what]
Column-parallel, Y = X A^T where a rank has A in part and, with sequence parallelism, X in part:

    forward     all-gather X                  product Y = X A^T
    backward    all-gather X again            under the product dX = dY A
                reduce-scatter dX             under the product dA = dY^T X

Only the rank's shard of X is kept for backward, 1/t of what the plain layer keeps; the second
gather is what that costs. Without sequence parallelism X is whole and only dX crosses: an
all-reduce, under the same product. Row-parallel, Y = X A^T where a rank has both in part:

    forward     product X A^T                 reduce-scatter Y
    backward    all-gather dY                 products dX = dY A and dA = dY^T X

Here each waits for the other, unless the positions are taken a piece at a time: then the gather of
the next piece hides under the product of this one, and the reduce-scatter of a finished piece under
the product of the next. Pieces are cut from every rank's shard alike, so a piece of the gathered
tensor is a block of positions of each rank. This also serves the forward of the column-parallel
layer. It costs smaller products and smaller messages, so it is for slow wires.

Sources: Korthikanti et al. 2022, section 4.2.2 (the shard that is gathered again); Wang et al.
2023, "Overlap Communication with Dependent Computation via Decomposition" (pieces).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ops.matmul import matmul
from ops.recompute import keep_now
from parallel.collectives import (
    Pending,
    all_gather,
    start_all_gather,
    start_reduce_scatter,
    start_tp_all_reduce,
)
from parallel.mesh import Mesh

# Pieces that a shard is cut into where both directions overlap.
_NUM_PIECES = 4

WeightAndBias = tuple[Tensor, Tensor | None]


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights = [tensor for tensor in tensors[::2] if tensor is not None]
        ctx.mesh = mesh
        ctx.save_for_backward(x, *weights)
        matrices = [weight.t() for weight in weights]
        outputs, _ = _gather_and_multiply(x, matrices, tensors[1::2], mesh)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mesh, (x, *weights) = ctx.mesh, ctx.saved_tensors
        gathering = start_all_gather(x, mesh.tp) if mesh.sequence_parallel else Pending(x)
        grad_x = matmul(_rows(grads[0]), weights[0])
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x += matmul(_rows(grad), weight)
        grad_x = grad_x.view(*grads[0].shape[:-1], -1)  # [s, b, in], a partial sum
        rows = _rows(gathering.wait())
        summing = start_tp_all_reduce(grad_x, mesh)
        of_tensors: list[Tensor | None] = []
        for number, grad in enumerate(grads):
            needs_weight, needs_bias = ctx.needs_input_grad[2 + 2 * number : 4 + 2 * number]
            of_tensors.append(matmul(_rows(grad).t(), rows) if needs_weight else None)
            of_tensors.append(_rows(grad).sum(dim=0) if needs_bias else None)
        return summing.wait(), None, *of_tensors


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh, weight: Tensor) -> Tensor:
        ctx.mesh = mesh
        # In a block that is recomputed, what follows would only send the layer's output again.
        ctx.kept = keep_now(x, weight)
        return _multiply_and_sum(x, weight.t(), mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), ctx.kept = ctx.kept(), None
        (grad_x,), grad = _gather_and_multiply(grad, [weight], [None], ctx.mesh)
        grad_weight = matmul(_rows(grad).t(), _rows(x)) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_weight


def column_parallel_linear(
    x: Tensor, weights: Sequence[WeightAndBias], mesh: Mesh
) -> tuple[Tensor, ...]:
    """`gather(x) A^T + b` for each `A` `[out/t, in]`; x `[s/t, b, in]`, results `[s, b, out/t]`.

    The same as `enter_tensor_parallel_region` and a product for each weight.
    """
    return _ColumnParallel.apply(x, mesh, *(tensor for pair in weights for tensor in pair))


def row_parallel_linear(x: Tensor, weight: Tensor, mesh: Mesh) -> Tensor:
    """The sum over ranks of `x A^T`; x `[s, b, in/t]`, `A` `[out, in/t]`, result `[s/t, b, out]`.

    The same as a product and `exit_tensor_parallel_region`.
    """
    return _RowParallel.apply(x, mesh, weight)


def _gather_and_multiply(
    x: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor | None], mesh: Mesh
) -> tuple[list[Tensor], Tensor]:
    """All positions of x `[s/t, b, k]`, times each matrix `[k, n]`; and all positions of x."""
    num_pieces = _num_pieces(x.shape[0], mesh)
    if num_pieces == 1:
        gathered = all_gather(x, mesh.tp) if mesh.sequence_parallel else x
        outputs = [
            matmul(_rows(gathered), matrix, bias).view(*gathered.shape[:-1], -1)
            for matrix, bias in zip(matrices, biases, strict=True)
        ]
        return outputs, gathered
    # [t, pieces, positions of a piece, b, ...]; flattened it is [s, b, ...] in order.
    shape = (mesh.tp.size, num_pieces, x.shape[0] // num_pieces, x.shape[1])
    gathered = x.new_empty(*shape, x.shape[2])
    outputs = [x.new_empty(*shape, matrix.shape[1]) for matrix in matrices]
    pieces = x.chunk(num_pieces)
    gathering = start_all_gather(pieces[0], mesh.tp)
    for number in range(num_pieces):
        piece = gathering.wait()
        if number + 1 < num_pieces:
            gathering = start_all_gather(pieces[number + 1], mesh.tp)
        gathered[:, number] = piece.view_as(gathered[:, number])
        for output, matrix, bias in zip(outputs, matrices, biases, strict=True):
            product = matmul(_rows(piece), matrix, bias)
            output[:, number] = product.view_as(output[:, number])
    return [output.flatten(0, 2) for output in outputs], gathered.flatten(0, 2)


def _multiply_and_sum(x: Tensor, matrix: Tensor, mesh: Mesh) -> Tensor:
    """x `[s, b, k]` times the matrix `[k, n]`, summed over ranks: `[s/t, b, n]`, or `[s, b, n]`."""
    num_pieces = _num_pieces(x.shape[0] // mesh.tp.size, mesh)
    if num_pieces == 1:
        y = matmul(_rows(x), matrix).view(*x.shape[:-1], -1)
        return start_tp_all_reduce(y, mesh).wait()
    pieces = x.unflatten(0, (mesh.tp.size, num_pieces, -1))
    summing = []
    for number in range(num_pieces):
        piece = pieces[:, number].flatten(0, 1)  # [positions, b, k]: a block of each rank's
        y = matmul(_rows(piece), matrix).view(*piece.shape[:-1], -1)
        summing.append(start_reduce_scatter(y, mesh.tp))
    return torch.cat([piece.wait() for piece in summing])


def _num_pieces(positions: int, mesh: Mesh) -> int:
    """How many pieces to take a shard of so many positions in."""
    can_cut = mesh.sequence_parallel and positions % _NUM_PIECES == 0
    return _NUM_PIECES if mesh.overlap == "both" and can_cut else 1


def _rows(x: Tensor) -> Tensor:
    """`[s, b, k]` to `[s b, k]`."""
    return x.reshape(-1, x.shape[-1])
