"""Data parallelism, and gradients after the backward pass: partial sums, norm, clipping.

PyTorch's FSDP2 shards weights, gradients and optimizer state (all float32) over dp x cp ranks, and
is configured to sum gradients; forward and backward use gathered copies in the compute dtype. With
HSDP they are sharded within each group of ranks, and FSDP2 sums the gradient shards over the groups
(an all-reduce) during the last backward. One rank needs none of this: its layers cast the weights
they use, and autograd adds the gradients of micro-batches in float32. After backward, each rank has
its float32 shard of every gradient.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ops.torch_private import foreach_copy_, foreach_mul_, foreach_norm
from parallel.collectives import move_to, sum_over
from parallel.mesh import Mesh
from parallel.parameters import LocalShard, local_shards


def shard_over_data_parallel(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    compute_dtype: torch.dtype,
    *,
    reshard_after_forward: bool,
) -> None:
    """Wrap each block, and the rest of the model as the root, in FSDP2 unless dp x cp is one rank.

    Embedding, positions, final norm and head stay together in the root, as a tied embedding is used
    twice. `reshard_after_forward`: free a block's gathered weights after its forward and gather
    them again for its backward. The root keeps its own.
    """
    if mesh.dp_cp.size == 1:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, model):
        fully_shard(
            module,
            mesh=mesh.fsdp_mesh,
            # None: FSDP2 reshards all but the root
            reshard_after_forward=None if reshard_after_forward else False,
            mp_policy=policy,
        )
        assert isinstance(module, FSDPModule)
        # The loss is already divided by the target count of the global batch, so gradients are
        # summed, not averaged. gloo needs both settings.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(
    model: nn.Module, enabled: bool, modules: Iterable[nn.Module] | None = None, *, is_last: bool
) -> None:
    """Set whether the next backward sums the gradients of `modules` (None: of all) over dp.

    If not, they accumulate unsharded in float32: less traffic, more memory. Only the last backward
    of a step sums them over the replicas of HSDP.
    """
    if not isinstance(model, FSDPModule):
        return
    for module in model.modules() if modules is None else modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)
            module.set_requires_all_reduce(is_last, recurse=False)


def set_reshard_after_backward(model: nn.Module, enabled: bool) -> None:
    """Set whether the next backward frees the gathered weights."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_backward(enabled)


def free_gathered_weights(model: nn.Module) -> None:
    """Free weights that are still gathered, for example after a forward without backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sum_partial_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum partial gradients in one all-reduce over tp, and a tied table's over its two stages."""
    free_gathered_weights(model)  # pipeline stages keep them until now
    gradients = _gradient_shards(model)
    partial = [gradient.tensor.view(-1) for gradient in gradients if gradient.grad_is_partial]
    if partial:
        summed = sum_over(mesh.tp, torch.cat(partial))
        foreach_copy_(partial, list(summed.split([grad.numel() for grad in partial])))
    for gradient in gradients:
        if gradient.is_tied:
            sum_over(mesh.tied, gradient.tensor)


def squared_norm(model: nn.Module, mesh: Mesh) -> Tensor:
    """This rank's share of the squared global norm of the gradients, a float64 scalar.

    The sum over all ranks is the squared norm: of a gradient that several ranks have, one rank
    counts it, or each replica its part.
    """
    counted = [
        gradient.tensor
        for gradient in _gradient_shards(model)
        if (gradient.tp_dim is not None or mesh.tp.rank == 0)
        and (not gradient.is_tied or mesh.pp.rank == 0)
    ]
    return _norms(counted).square().sum() / mesh.replicas.size


def clip_gradients(model: nn.Module, norm: float, largest_norm: float) -> None:
    """Scale all gradients, whose global norm is `norm`, so that it is at most `largest_norm`."""
    if (scale := largest_norm / (norm + 1e-6)) < 1.0:
        gradients = [gradient.tensor for gradient in _gradient_shards(model)]
        foreach_mul_(gradients, scale)


def _gradient_shards(model: nn.Module) -> list[LocalShard]:
    return list(local_shards(model, lambda parameter: cast(Tensor, parameter.grad)).values())


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements of float32 tensors are finite."""
    return bool(move_to(_norms(tensors), "cpu").isfinite().all())


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each float32 tensor, in float64.

    In float32, squares of large elements overflow, and torch 2.13 sums sequentially on a CPU: an
    error of 8e-5 for 4 million elements, which depends on the layout.
    """
    return torch.stack(foreach_norm(list(tensors), 2, dtype=torch.float64))
