"""Gradients after the backward pass: sum the partial ones over ranks, clip by the global norm.

Each rank has its float32 shard of every gradient, summed over micro-batches and dp.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ops.torch_private import foreach_copy_, foreach_mul_, foreach_norm
from parallel.collectives import move_to, sum_over
from parallel.data_parallel import free_gathered_weights
from parallel.mesh import Mesh
from parallel.parameters import LocalShard, local_shards


def local_gradients(model: nn.Module) -> list[LocalShard]:
    """This rank's part of every gradient, after a step's last backward; frees gathered weights."""
    free_gathered_weights(model)  # pipeline stages keep them until now
    return list(local_shards(model, lambda parameter: cast(Tensor, parameter.grad)).values())


def sum_partial_gradients(gradients: Sequence[LocalShard], mesh: Mesh) -> None:
    """Sum partial gradients in one all-reduce over tp, and a tied table's over its two stages."""
    partial = [gradient.tensor.view(-1) for gradient in gradients if gradient.grad_is_partial]
    if partial:
        summed = sum_over(mesh.tp, torch.cat(partial))
        foreach_copy_(partial, list(summed.split([grad.numel() for grad in partial])))
    for gradient in gradients:
        if gradient.is_tied:
            sum_over(mesh.tied, gradient.tensor)


def squared_norm(gradients: Sequence[LocalShard], mesh: Mesh) -> Tensor:
    """This rank's share of the squared global norm of the gradients, a float64 scalar.

    The sum over all ranks is the squared norm: a gradient that several tp ranks or stages hold is
    counted by one of them, and each replica counts its fraction of the whole.
    """
    counted = [
        gradient.tensor
        for gradient in gradients
        if (gradient.tp_dim is not None or mesh.tp.rank == 0)
        and (not gradient.is_tied or mesh.pp.rank == 0)
    ]
    return _norms(counted).square().sum() / mesh.replicas.size


def clip_gradients(gradients: Sequence[LocalShard], norm: float, largest_norm: float) -> None:
    """Scale all gradients, whose global norm is `norm`, so that it is at most `largest_norm`."""
    if (scale := largest_norm / (norm + 1e-6)) < 1.0:
        foreach_mul_([gradient.tensor for gradient in gradients], scale)


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements of float32 tensors are finite."""
    return bool(move_to(_norms(tensors), "cpu").isfinite().all())


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each float32 tensor, in float64.

    In float32, squares of large elements overflow, and torch 2.13 sums sequentially on a CPU: an
    error of 8e-5 for 4 million elements, which depends on the layout.
    """
    return torch.stack(foreach_norm(list(tensors), 2, dtype=torch.float64))
