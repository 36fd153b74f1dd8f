"""Gradients after the backward pass: sum the partial ones over tp, then clip by the global norm.

FSDP2 has summed every gradient over dp and leaves each rank its float32 shard.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from parallel.collectives import move_to, sum_over
from parallel.dp_overlap import await_gradients
from parallel.mesh import Mesh
from parallel.parameters import parameter_facts, tp_shard_dim


def sum_partial_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum over tp the gradients that are partial (see parameters.py); one all-reduce for all."""
    await_gradients(model)
    facts = parameter_facts(model)
    partial = [
        parameter.grad.to_local().view(-1)  # type: ignore[union-attr]
        for name, parameter in model.named_parameters()
        if facts[name].grad_is_partial
    ]
    if partial:
        summed = sum_over(mesh.tp, torch.cat(partial))
        torch._foreach_copy_(partial, list(summed.split([grad.numel() for grad in partial])))


def clip_gradients(model: nn.Module, largest_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global norm is at most `largest_norm`; 0: never scale.

    Returns the norm before scaling, a float64 scalar, the same on every rank. A gradient that is
    replicated over tp counts once. One all-reduce.
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
    """Whether all elements of float32 tensors are finite."""
    return bool(move_to(_norms(tensors), "cpu").isfinite().all())


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each float32 tensor, in float64.

    In float32, squares of large elements overflow, and torch 2.13 sums sequentially on a CPU: the
    norm of 4 million elements is off by 8e-5, which makes it depend on the layout.
    """
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64))
