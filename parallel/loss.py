"""Vocab-parallel output head and cross-entropy in one function, a chunk of positions at a time.

[Note: vocab-parallel loss]
For one position with hidden state x, logits z = W x and target k:

    log_z = log sum_j exp(z_j)
    loss = log_z - z_k
    objective = loss + c log_z^2
    d objective / dz_j = (1 + 2 c log_z) softmax(z)_j - [j = k]

c log_z^2 is the z-loss, which keeps log_z near 0 (Chowdhery et al. 2022, section 5). Each rank has
some of the j. For a chunk of positions it computes its logits and gathers two float32 numbers per
position: the log of its part of the sum, and z_k if k is one of its j. These give it log_z, the
loss, the gradient of its logits, its term of dX and its part of dW. The objective is a sum over
positions, so forward can compute all of this, and backward only scales by the upstream gradient.
The full logits `[s, b, v/t]`, the largest tensor of a small model, are never stored.
(Shoeybi et al. 2019, section 3, describe the vocab-parallel loss; the fused gradient is ours.)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.matmul import add_matmul_, matmul_fp32, widen, widen_for_fp32
from parallel.collectives import all_gather, start_tp_reduce
from parallel.mesh import Axis, Mesh
from parallel.parameters import shard_range

# Logits per chunk: few enough for a CPU's caches, enough to keep a GPU busy.
_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


class Losses(NamedTuple):
    """Sums over all targets of a micro-batch, float32 scalars, the same on all tp ranks."""

    objective: Tensor  # cross_entropy + z_loss_coeff * log_z_squared; the differentiable one
    cross_entropy: Tensor  # -log p(target), in nats
    log_z_squared: Tensor  # log^2 of the softmax denominator
    of_rows: Tensor | None = None  # cross_entropy of each row [b], if there are no gradients


class _Targets(NamedTuple):
    """Where the targets of n positions are among this rank's columns."""

    column: Tensor  # [n, 1], 0 if on another rank
    is_ours: Tensor  # [n]
    counts: Tensor  # [n], false where the target is ignored


def _find_targets(targets: Tensor, first_id: int, num_columns: int) -> _Targets:
    column = targets - first_id
    is_ours = (column >= 0) & (column < num_columns)
    return _Targets(column.masked_fill(~is_ours, 0).unsqueeze(1), is_ours, targets >= 0)


class _HeadLoss(torch.autograd.Function):
    """See [Note: vocab-parallel loss]. Saves dX and dW, ready to be scaled in backward."""

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows = all_gather(x, mesh.tp) if mesh.sequence_parallel else x  # [s, b, h]
        rows = rows.reshape(-1, x.shape[-1])  # [s b, h]
        matrix = widen(weight, "right")  # [v/t, h]
        fp32_matrix = widen_for_fp32(matrix, "right")
        first_id, _ = shard_range(vocab_size, mesh.tp.size, mesh.tp.rank)
        at_least_fp32 = torch.promote_types(weight.dtype, torch.float32)
        sums = torch.zeros(2, dtype=at_least_fp32, device=x.device)
        if with_gradients:
            grad_rows = torch.empty_like(rows)
            grad_weight = torch.zeros_like(weight, dtype=at_least_fp32)
        # From the largest shard, so that all ranks use the same chunks.
        num_logits = _CHUNK_ELEMENTS[mesh.kernels or x.device.type]
        length = max(1, num_logits // -(-vocab_size // mesh.tp.size))
        flat_targets, of_positions = targets.flatten(), []
        for start in range(0, len(rows), length):
            chunk = slice(start, start + length)
            target = _find_targets(flat_targets[chunk], first_id, len(matrix))
            operand = widen(rows[chunk], "left")
            z = matmul_fp32(operand, fp32_matrix.t())  # [n, v/t]
            log_z, loss, softmax_scale = _log_sum_exp_and_loss_(z, target, mesh.tp)
            per_position = torch.stack([loss, log_z.square()]).masked_fill(~target.counts, 0.0)
            sums += per_position.sum(dim=1)
            if with_gradients:
                softmax_scale *= 1.0 + 2.0 * z_loss_coeff * log_z
                grad_z = _logits_grad_(z, softmax_scale, target).to(matrix.dtype)
                grad_rows[chunk] = torch.mm(grad_z, matrix)
                add_matmul_(grad_weight, grad_z.t(), operand)
            else:
                of_positions.append(per_position[0])
        of_rows = None
        if with_gradients:
            grad_rows = grad_rows.view(-1, *x.shape[1:])
            grad_x = start_tp_reduce(grad_rows, mesh).wait()  # [s/t, b, h], as x
            ctx.gradients, ctx.weight_dtype = (grad_x, grad_weight), weight.dtype
        else:
            of_rows = torch.cat(of_positions).view_as(targets).sum(dim=0)
        cross_entropy, log_z_squared = sums.unbind()
        ctx.mark_non_differentiable(cross_entropy, log_z_squared)
        objective = cross_entropy + z_loss_coeff * log_z_squared
        return objective, cross_entropy, log_z_squared, of_rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # In place, and so only once: a copy of dW in float32 is as large as the embedding.
        assert ctx.gradients is not None, "the loss has been differentiated before"
        (grad_x, grad_weight), ctx.gradients = ctx.gradients, None
        grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        # In float32, because a GPU would round the factor to the bfloat16 of grad_x.
        grad_x = grad_x.to(grad.dtype).mul_(grad).to(grad_x.dtype)
        return grad_x, grad_weight, None, None, None, None, None


def _log_sum_exp_and_loss_(z: Tensor, target: _Targets, tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Compute log_z, the loss and a factor, `[n]` each; z `[n, v/t]` becomes softmax / factor."""
    target_logit = z.gather(1, target.column).squeeze(1).masked_fill(~target.is_ours, 0.0)
    maximum = z.amax(dim=1)
    local_log_z = z.sub_(maximum.unsqueeze(1)).exp_().sum(dim=1).log() + maximum
    mine = torch.stack([local_log_z, target_logit]).unsqueeze(0)  # [1, 2, n]
    all_ranks = all_gather(mine, tp) if tp.size > 1 else mine  # [t, 2, n]
    log_z, target_logit = all_ranks[:, 0].logsumexp(dim=0), all_ranks[:, 1].sum(dim=0)
    return log_z, log_z - target_logit, (maximum - log_z).exp()


def _logits_grad_(z: Tensor, softmax_scale: Tensor, target: _Targets) -> Tensor:
    """Turn z, now exp(logits - max), into d objective / dz in place."""
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
    """Compute the losses of hidden states x `[s/t, b, h]` under a head `weight` `[v/t, h]`.

    `targets` `[s, b]` are global token ids, negative where ignored.
    Forward: all-gather of x (or nothing); an all-gather of `[2, n]` float32 for each chunk of n
    positions; with gradients, reduce-scatter (or all-reduce) of dX. Backward: nothing.
    """
    first_id, end_id = shard_range(vocab_size, mesh.tp.size, mesh.tp.rank)
    assert len(weight) == end_id - first_id, "weight must be this rank's part of the vocabulary"
    with_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return Losses(
        *_HeadLoss.apply(x, weight, targets, vocab_size, z_loss_coeff, with_gradients, mesh)
    )
