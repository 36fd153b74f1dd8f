"""Cross-entropy on logits that are split by vocabulary and never gathered.

[Note: vocab-parallel cross-entropy]
For one position with logits z and target k:

    log_z = log sum_j exp(z_j - m) + m                  m = max_j z_j
    loss = log_z - z_k
    dz_j = softmax(z)_j (dloss + dlog_z) - [j = k] dloss

log_z is there for the z-loss, which keeps it near 0 (Chowdhery et al. 2022, section 5).

Each rank has some of the j. Crossing the wire, all float32 of `[s, b]`: the maximum, then the sum
of exponentials and z_k together. Backward is local. (Megatron-LM exchanges the last two apart.)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Axis, Mesh
from parallel.sharding import shard_range


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, first_id: int, tp: Axis
    ) -> tuple[Tensor, Tensor]:
        z = logits.float()
        maximum = z.amax(dim=-1)  # [s, b]
        if tp.size > 1:
            # On gloo a maximum can drop a NaN, the sum of exponentials below cannot.
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=tp.group)
        column = targets - first_id  # of the target, if it is one of ours
        is_ours = (column >= 0) & (column < z.shape[-1])
        column = column.masked_fill(~is_ours, 0).unsqueeze(-1)  # [s, b, 1]
        target_logit = z.gather(-1, column).squeeze(-1).masked_fill(~is_ours, 0.0)
        exponentials = (z - maximum.unsqueeze(-1)).exp_()
        sums = torch.stack([exponentials.sum(dim=-1), target_logit])  # [2, s, b]
        if tp.size > 1:
            dist.all_reduce(sums, group=tp.group)
        log_z = sums[0].log() + maximum
        ignored = targets < 0
        # The logits are kept in their own precision and exponentiated again in backward: half the
        # memory of float32 probabilities.
        ctx.save_for_backward(logits, log_z, column, is_ours, ignored)
        return (log_z - sums[1]).masked_fill(ignored, 0.0), log_z.masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_log_z: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_z, column, is_ours, ignored = ctx.saved_tensors
        grad_logits = (logits.float() - log_z.unsqueeze(-1)).exp_()  # softmax
        grad_logits *= (grad_loss + grad_log_z).masked_fill(ignored, 0.0).unsqueeze(-1)
        of_target = grad_loss.masked_fill(ignored | ~is_ours, 0.0).unsqueeze(-1)
        grad_logits.scatter_add_(-1, column, -of_target)
        return grad_logits.to(logits.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, mesh: Mesh
) -> tuple[Tensor, Tensor]:
    """Loss of each target in nats, and log_z: `[s, b]` float32, 0 where the target is ignored.

    The same on all tp ranks. `logits` `[s, b, v/t]`; `targets` `[s, b]` global token ids, negative
    where ignored.
    """
    first_id, end_id = shard_range(vocab_size, mesh.tp.size, mesh.tp.rank)
    assert logits.shape[-1] == end_id - first_id, (
        "logits must be this rank's part of the vocabulary"
    )
    return _VocabParallelCrossEntropy.apply(logits, targets, first_id, mesh.tp)
