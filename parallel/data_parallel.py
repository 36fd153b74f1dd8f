"""Data parallelism: PyTorch's FSDP2 on the dp axis, set so that gradients are sums.

Master weights, gradients and optimizer state are float32 and sharded over dp; the forward and
backward pass see gathered copies in the compute precision. One rank takes the same path.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.mesh import Mesh


def shard_over_data_parallel(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, compute_dtype: torch.dtype
) -> None:
    """Wrap each block, and the rest of the model as the root, in FSDP2.

    Embedding, positions, final norm and head stay together in the root: a tied embedding wrapped
    apart would be freed between its two uses.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh.device_mesh["dp"], mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the targets of the whole global batch, so gradients are
            # summed. On gloo neither setting alone does it.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Tell FSDP2 whether the next backward sums its gradients over dp.

    Without, they wait in float32 and unsharded: less traffic, more memory.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(enabled)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the gathered copies that a forward without backward leaves; shards are seen again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
