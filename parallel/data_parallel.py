"""Data parallelism: PyTorch's FSDP2 over dp and cp ranks, configured to sum gradients.

Weights, gradients and optimizer state are float32 and sharded over dp x cp; forward and backward
use gathered copies in the compute dtype. One rank needs none of this: its layers cast the weights
they use, and autograd adds the gradients of micro-batches in float32.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from parallel.dp_overlap import overlap_on_cpu
from parallel.mesh import Mesh


def shard_over_data_parallel(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    compute_dtype: torch.dtype,
    *,
    overlap: bool,
    one_sum_per_step: bool,
) -> None:
    """Wrap each block, and the rest of the model as the root, in FSDP2 unless dp x cp is one rank.

    Embedding, positions, final norm and head stay together in the root: FSDP2 would free a tied
    embedding of its own between its two uses. `overlap` and `one_sum_per_step`: see dp_overlap.py.
    """
    if mesh.dp_cp.size == 1:
        return
    blocks = list(blocks)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A stage of a pipeline gathers its weights once a step: forwards and backwards alternate.
    reshards = mesh.pp.size == 1
    for module in (*blocks, model):
        fully_shard(
            module,
            mesh=mesh.fsdp_mesh,
            mp_policy=policy,
            reshard_after_forward=None if reshards else False,
        )
        assert isinstance(module, FSDPModule)
        # The loss is already divided by the target count of the global batch, so gradients are
        # summed, not averaged. gloo needs both settings.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reshard_after_backward(reshards)
    if overlap and mesh.device.type == "cpu":
        overlap_on_cpu(model, blocks, one_sum_per_step)


def set_gradient_sync(
    model: nn.Module, enabled: bool, modules: Iterable[nn.Module] | None = None
) -> None:
    """Set whether the next backward sums the gradients of `modules` (None: of all) over dp.

    If not, they accumulate unsharded in float32: less traffic, more memory.
    """
    if not isinstance(model, FSDPModule):
        return
    if enabled and hasattr(model, "deferred"):  # FSDP2 would add to a sum that is still running
        sharded = (parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
        assert all(parameter.grad is None for parameter in sharded)
    for module in model.modules() if modules is None else modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled, recurse=False)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the gathered weights that a forward without backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
