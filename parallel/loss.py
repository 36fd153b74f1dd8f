"""The head and its loss in one: logits are made, used and forgotten, a piece of them at a time.

[Note: vocab-parallel loss]
For one position with hidden state x, logits z = W x and target k:

    log_z = log sum_j exp(z_j)
    loss = log_z - z_k
    objective = loss + c log_z^2
    d objective / dz_j = (1 + 2 c log_z) softmax(z)_j - [j = k]

The second term of the objective is the z-loss, which keeps log_z near 0 (Chowdhery et al. 2022,
section 5). Each rank has some of the j. For a piece of the positions it makes its logits and sends
two float32 numbers a position: the log of its part of the sum, and z_k if k is one of its j. With
those of the others it has log_z and the loss; then the gradient of its logits; then dX and its part
of dW. As the objective is a sum over positions, forward can do all of this, and backward only
scales the result by the gradient of the objective. So the logits `[s, b, v/t]`, which in float32
are the largest tensor of a small model, never exist whole, and are made once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.matmul import add_matmul_, matmul_fp32, widen, widen_exactly
from parallel.collectives import all_gather, start_tp_all_reduce
from parallel.mesh import Axis, Mesh
from parallel.parameters import shard_range

# Logits at a time: as many as a processor's caches hold, or as keep a GPU busy.
_PIECE_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


class Losses(NamedTuple):
    """Sums over all targets of a micro-batch, float32 scalars, the same on all tp ranks."""

    objective: Tensor  # cross_entropy + z_loss_coeff * log_z_squared; has the gradients
    cross_entropy: Tensor  # -log p(target), in nats
    log_z_squared: Tensor  # log^2 of the denominator of p


class _Targets(NamedTuple):
    """Where the targets of n positions are among this rank's columns."""

    column: Tensor  # [n, 1], 0 if it is another rank's
    is_ours: Tensor  # [n]
    counts: Tensor  # [n], false where the target is ignored

    def piece(self, positions: slice) -> "_Targets":
        """Those of some of the positions."""
        return _Targets(*(tensor[positions] for tensor in self))


def _find_targets(targets: Tensor, first_id: int, num_columns: int) -> _Targets:
    column = targets.reshape(-1) - first_id
    is_ours = (column >= 0) & (column < num_columns)
    return _Targets(column.masked_fill(~is_ours, 0).unsqueeze(1), is_ours, targets.reshape(-1) >= 0)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        z_loss_coeff: float,
        with_gradients: bool,
        mesh: Mesh,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = all_gather(x, mesh.tp) if mesh.sequence_parallel else x  # [s, b, h]
        rows = rows.reshape(-1, x.shape[-1])  # [s b, h]
        matrix = widen(weight, "right")  # [v/t, h]
        exact = widen_exactly(matrix, "right")
        first_id, _ = shard_range(vocab_size, mesh.tp.size, mesh.tp.rank)
        of_all = _find_targets(targets, first_id, len(matrix))
        at_least_float32 = torch.promote_types(weight.dtype, torch.float32)
        sums = torch.zeros(2, dtype=at_least_float32, device=x.device)
        if with_gradients:
            grad_rows = torch.empty_like(rows)
            grad_weight = torch.zeros_like(weight, dtype=at_least_float32)
        # By the largest shard and not by this rank's own, which may have a row less: all ranks must
        # cut alike.
        length = max(1, _PIECE_ELEMENTS[x.device.type] // -(-vocab_size // mesh.tp.size))
        for start in range(0, len(rows), length):
            piece = slice(start, start + length)
            target, operand = of_all.piece(piece), widen(rows[piece], "left")
            z = matmul_fp32(operand, exact.t())  # [n, v/t]
            log_z, loss, softmax_scale = _log_sum_exp_and_loss_(z, target, mesh.tp)
            of_positions = torch.stack([loss, log_z.square()])
            sums += of_positions.masked_fill(~target.counts, 0.0).sum(dim=1)
            if with_gradients:
                softmax_scale *= 1.0 + 2.0 * z_loss_coeff * log_z
                grad_z = _logits_grad_(z, softmax_scale, target).to(matrix.dtype)
                grad_rows[piece] = torch.mm(grad_z, matrix)
                add_matmul_(grad_weight, grad_z.t(), operand)
        if with_gradients:
            grad_rows = grad_rows.view(-1, *x.shape[1:])
            grad_x = start_tp_all_reduce(grad_rows, mesh).wait()  # as x: [s/t, b, h]
            ctx.gradients, ctx.weight_dtype = (grad_x, grad_weight), weight.dtype
        cross_entropy, log_z_squared = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, log_z_squared)
        return cross_entropy + z_loss_coeff * log_z_squared, cross_entropy, log_z_squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, once: a copy of dW is as large as the embedding, in float32.
        assert ctx.gradients is not None, "the loss has been differentiated before"
        (grad_x, grad_weight), ctx.gradients = ctx.gradients, None
        grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        # In float32: times a bfloat16 tensor, a GPU would round the factor itself to bfloat16.
        grad_x = grad_x.to(grad.dtype).mul_(grad).to(grad_x.dtype)
        return grad_x, grad_weight, None, None, None, None, None


def _log_sum_exp_and_loss_(z: Tensor, target: _Targets, tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """log_z and loss of n positions, ignored ones too; z becomes the softmax but for a factor.

    z: `[n, v/t]` logits, in whose place exp(z - their maximum) is left. The factor, `[n]`, is the
    third result.
    """
    target_logit = z.gather(1, target.column).squeeze(1).masked_fill(~target.is_ours, 0.0)
    maximum = z.amax(dim=1)
    log_of_ours = z.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1).log() + maximum
    mine = torch.stack([log_of_ours, target_logit]).unsqueeze(0)  # [1, 2, n]
    all_ranks = all_gather(mine, tp) if tp.size > 1 else mine  # [t, 2, n]
    log_z, target_logit = all_ranks[:, 0].logsumexp(dim=0), all_ranks[:, 1].sum(dim=0)
    return log_z, log_z - target_logit, (maximum - log_z).exp()


def _logits_grad_(z: Tensor, softmax_scale: Tensor, target: _Targets) -> Tensor:
    """d objective / dz in place of z, of which `softmax_scale` makes the first of its two terms."""
    z.mul_(softmax_scale.masked_fill(~target.counts, 0.0).unsqueeze(1))
    at_target = -(target.is_ours & target.counts).to(z.dtype)
    return z.scatter_add_(1, target.column, at_target.unsqueeze(1))


def vocab_parallel_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    mesh: Mesh,
    z_loss_coeff: float = 0.0,
) -> Losses:
    """The losses of a head `weight` `[v/t, h]` on hidden states x `[s/t, b, h]`.

    `targets` `[s, b]` global token ids, negative where ignored. Forward: all-gather of x (or
    nothing), an all-gather of `[2, n]` float32 for each piece of n positions, and if there will be
    a backward, the reduce-scatter (or all-reduce) of dX. Backward: nothing.
    """
    first_id, end_id = shard_range(vocab_size, mesh.tp.size, mesh.tp.rank)
    assert len(weight) == end_id - first_id, "weight must be this rank's part of the vocabulary"
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return Losses(
        *_HeadLoss.apply(x, weight, targets, vocab_size, z_loss_coeff, with_gradients, mesh)
    )
