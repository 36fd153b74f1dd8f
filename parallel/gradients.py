"""Gradients after the backward pass: the sum of partial ones, the global norm, clipping.

FSDP2 sums every gradient over dp and leaves each rank its float32 shard; on a processor the last of
these sums may still be under way. What remains is tp: see [Note: partial gradients] in
parameters.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parallel.collectives import move_to, sum_over
from parallel.data_parallel import await_gradients
from parallel.mesh import Mesh
from parallel.parameters import parameter_facts, tp_shard_dim


def sum_partial_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum the gradients that are partial over tp: one all-reduce of all of them together.

    First waits for the sums over dp.
    """
    await_gradients(model)
    facts = parameter_facts(model)
    partial = [
        parameter.grad.to_local()  # type: ignore[union-attr]
        for name, parameter in model.named_parameters()
        if facts[name].grad_is_partial
    ]
    if not partial:
        return
    summed = sum_over(mesh.tp, torch.cat([grad.view(-1) for grad in partial]))
    torch._foreach_copy_(
        [grad.view(-1) for grad in partial], list(summed.split([g.numel() for g in partial]))
    )


def clip_gradients(model: nn.Module, largest_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global norm is at most `largest_norm`; 0 never scales.

    Returns the norm before scaling, a float64 scalar and the same on every rank. A gradient that
    every tp rank has in full counts once. One all-reduce.
    """
    gradients, counted = [], []
    for parameter in model.parameters():
        gradient = parameter.grad.to_local()  # type: ignore[union-attr]
        gradients.append(gradient)
        if tp_shard_dim(parameter) is not None or mesh.tp.rank == 0:
            counted.append(gradient)
    norm = sum_over(mesh.world, _norms(counted).square().sum()).sqrt()
    if largest_norm > 0:
        scale = (largest_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale.float())
    return norm


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements of float32 tensors are finite numbers."""
    return bool(move_to(_norms(tensors), "cpu").isfinite().all())


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each float32 tensor, in float64.

    In float32 the squares of large elements are infinite, and torch 2.13 sums a processor's one
    after the other: the norm of 4 million elements is 8e-5 away, and so depends on the layout.
    """
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))
