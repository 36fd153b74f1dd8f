"""Data parallelism: PyTorch's FSDP2 on the dp axis, set so that gradients are sums.

Master weights, gradients and optimizer state are float32 and sharded over dp; the forward and
backward pass see gathered copies in the compute precision. One rank takes the same path.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from parallel.collectives import await_work
from parallel.mesh import Mesh

# Sums under way at a time; each holds a block's gradients, in float32 and of all dp ranks.
_MOST_UNDER_WAY = 2


class _AsyncReduceScatter(DefaultReduceScatter):
    """FSDP2's reduce-scatter of gradients, begun when it is asked for and awaited later.

    On a processor FSDP2 would wait at once. It reads nothing of the result before the update as
    long as there is one sum a step, so backward can go on.
    """

    def __init__(self) -> None:
        self.under_way: list[dist.Work] = []

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work:
        self.wait(_MOST_UNDER_WAY - 1)
        work = dist.reduce_scatter_single(output_tensor, input_tensor, op, group, async_op=True)
        self.under_way.append(work)
        return work

    def wait(self, most_left: int = 0) -> None:
        """Until no more than so many sums are under way."""
        while len(self.under_way) > most_left:
            await_work(self.under_way.pop(0))


def shard_over_data_parallel(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: Mesh,
    compute_dtype: torch.dtype,
    *,
    overlap: bool,
    one_sum_a_step: bool,
) -> None:
    """Wrap each block, and the rest of the model as the root, in FSDP2.

    Embedding, positions, final norm and head stay together in the root: a tied embedding wrapped
    apart would be freed between its two uses.

    FSDP2 gathers a block's weights and sums its gradients on streams of a GPU, under the work of
    the blocks around it. A processor has no streams: there it does so only with `overlap`, of the
    sums only with `one_sum_a_step`, as it adds a second one to the first at once. Then
    `await_gradients` must follow a backward that sums before its gradients are read.
    """
    blocks = list(blocks)
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
    if overlap and mesh.device.type == "cpu" and mesh.dp.size > 1:
        _enable_prefetch(model, blocks)
        if one_sum_a_step:
            _defer_reduce_scatter(model, blocks)


def _enable_prefetch(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Gather the next block's weights under this one's work, in backward the last one's."""
    assert isinstance(model, FSDPModule)
    model._set_unshard_async_op(True)  # of all gathers; backward begins them ahead by itself
    for block, following in itertools.pairwise((model, *blocks)):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])


def _defer_reduce_scatter(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Sum a block's gradients under the backward of those before it."""
    reduce_scatter = _AsyncReduceScatter()
    model.awaited = reduce_scatter  # type: ignore[assignment]  # not a submodule
    for module in (model, *blocks):
        assert isinstance(module, FSDPModule)
        module.set_custom_reduce_scatter(reduce_scatter)


def await_gradients(model: nn.Module) -> None:
    """Wait for sums of gradients that are still under way."""
    reduce_scatter = getattr(model, "awaited", None)
    if reduce_scatter is not None:
        reduce_scatter.wait()


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Tell FSDP2 whether the next backward sums its gradients over dp.

    Without, they wait in float32 and unsharded: less traffic, more memory.
    """
    assert isinstance(model, FSDPModule)
    if enabled and hasattr(model, "awaited"):
        # FSDP2 would add the next sum to the last one at once, before it is there.
        assert all(parameter.grad is None for parameter in model.parameters())
    model.set_requires_gradient_sync(enabled)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the gathered copies that a forward without backward leaves; shards are seen again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
