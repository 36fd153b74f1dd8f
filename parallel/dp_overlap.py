"""`parallel.dp_comm_overlap`: overlap FSDP2's communication with compute on CPUs.

On a GPU, FSDP2 gathers weights and sums gradients on streams of their own. A CPU has no streams, so
there it would wait for each collective at once.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ops.torch_private import (
    DefaultReduceScatter,
    enable_async_unshard,
    reduce_scatter_single,
)
from parallel.collectives import await_work

_MAX_PENDING = 2  # each holds the float32 gradients of a block, of all dp ranks


class _AsyncReduceScatter(DefaultReduceScatter):
    """FSDP2's reduce-scatter of gradients, started at once and awaited later.

    With one sum per step FSDP2 does not read the result before the update, so backward continues.
    """

    def __init__(self) -> None:
        self.pending: list[dist.Work] = []

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work:
        self.wait(_MAX_PENDING - 1)
        work = reduce_scatter_single(output_tensor, input_tensor, op, group, async_op=True)
        self.pending.append(work)
        return work

    def wait(self, max_pending: int = 0) -> None:
        """Wait, oldest first, until at most `max_pending` are still running."""
        while len(self.pending) > max_pending:
            await_work(self.pending.pop(0))


def overlap_on_cpu(model: nn.Module, blocks: Sequence[nn.Module], one_sum_per_step: bool) -> None:
    """Prefetch the next block's weights; with one sum per step also defer sums of gradients.

    FSDP2 adds a second sum to the first without waiting, so several sums per step are not deferred.
    """
    _enable_prefetch(model, blocks)
    if one_sum_per_step:
        _defer_reduce_scatter(model, blocks)


def _enable_prefetch(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    assert isinstance(model, FSDPModule)
    enable_async_unshard(model)  # backward then prefetches by itself
    for block, following in itertools.pairwise((model, *blocks)):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])


def _defer_reduce_scatter(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    reduce_scatter = _AsyncReduceScatter()
    model.deferred = reduce_scatter  # type: ignore[assignment]  # not a submodule
    for module in (model, *blocks):
        assert isinstance(module, FSDPModule)
        module.set_custom_reduce_scatter(reduce_scatter)


def await_gradients(model: nn.Module) -> None:
    """Wait for deferred sums of gradients; call it after backward, before reading gradients."""
    reduce_scatter = getattr(model, "deferred", None)
    if reduce_scatter is not None:
        reduce_scatter.wait()
