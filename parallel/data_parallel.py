"""Data parallelism: PyTorch's FSDP2 over dp and cp ranks, configured to sum gradients.

Weights, gradients and optimizer state are float32 and sharded over dp x cp; forward and backward
use gathered copies in the compute dtype. With HSDP they are sharded within each group of ranks, and
FSDP2 sums the gradient shards over the groups (an all-reduce) during the last backward. One rank
needs none of this: its layers cast the weights they use, and autograd adds the gradients of
micro-batches in float32.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import Mesh


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
