"""The mappings between regions of the network, as conjugate pairs of autograd functions.

    mapping                  forward          backward         used for
    copy_to_ranks            identity         all-reduce       f of Shoeybi et al.
    reduce_over_ranks        all-reduce       identity         g of Shoeybi et al.
    gather_sequence          all-gather       reduce-scatter   g of Korthikanti et al.
    reduce_scatter_sequence  reduce-scatter   all-gather       g-bar of Korthikanti et al.
    replicate_sequence       all-gather       local chunk      shards to duplicated compute
    split_sequence           local chunk      all-gather       duplicated compute to shards

The two of a pair are each other's backward: as matrices on the inputs of all ranks, they are
transposes. All act on dim 0, the sequence, of `[s, b, h]`.

[Note: two gathers]
`gather_sequence` and `replicate_sequence` have the same forward; the compute that follows decides
the backward. In tensor-parallel compute, each rank uses the result differently (its own columns),
so the gradient is a sum over ranks: a reduce-scatter. In duplicated compute, every rank already has
the full gradient and keeps its own positions; a sum would be t times too large.

Sources: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_reduce, local_sequence_chunk, reduce_scatter
from parallel.mesh import Axis, Mesh


class _Mapping(torch.autograd.Function):
    """Maps x with one function of (tensor, axis), and its gradient with another."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        axis: Axis,
        forward: Callable[[Tensor, Axis], Tensor],
        backward: Callable[[Tensor, Axis], Tensor],
    ) -> Tensor:
        ctx.axis, ctx.map_grad = axis, backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.map_grad(grad, ctx.axis), None, None, None


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def copy_to_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Return x, which every rank has; backward sums the gradients over ranks."""
    return _Mapping.apply(x, axis, _identity, all_reduce)


def reduce_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over ranks, `[s, ...]` on every rank; backward is the identity."""
    return _Mapping.apply(x, axis, all_reduce, _identity)


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Gather `[s/t, ...]` to `[s, ...]` before tensor-parallel compute: [Note: two gathers]."""
    return _Mapping.apply(x, axis, all_gather, reduce_scatter)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Sum x over ranks and keep this rank's positions, `[s, ...]` to `[s/t, ...]`."""
    return _Mapping.apply(x, axis, reduce_scatter, all_gather)


def replicate_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Gather `[s/t, ...]` to `[s, ...]` before duplicated compute: [Note: two gathers]."""
    return _Mapping.apply(x, axis, all_gather, local_sequence_chunk)


def split_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Keep this rank's positions of a duplicated tensor, `[s, ...]` to `[s/t, ...]`."""
    return _Mapping.apply(x, axis, local_sequence_chunk, all_gather)


def enter_tensor_parallel_region(x: Tensor, mesh: Mesh) -> Tensor:
    """Give every tp rank all positions: `[s/t, b, h]` (or `[s, b, h]`) to `[s, b, h]`.

    Forward: all-gather with sequence parallelism, else nothing. Backward: reduce-scatter, else
    all-reduce.
    """
    if mesh.tp.size == 1:
        return x
    return gather_sequence(x, mesh.tp) if mesh.sequence_parallel else copy_to_ranks(x, mesh.tp)


def exit_tensor_parallel_region(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum partial results over tp: `[s, b, h]` to `[s/t, b, h]` (or `[s, b, h]`).

    Forward: reduce-scatter with sequence parallelism, else all-reduce. Backward: all-gather, else
    nothing.
    """
    if mesh.tp.size == 1:
        return x
    if mesh.sequence_parallel:
        return reduce_scatter_sequence(x, mesh.tp)
    return reduce_over_ranks(x, mesh.tp)


def sequence_shard(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's positions of data that every tp rank has, `[s, ...]` to `[s/t, ...]`; no grad."""
    return local_sequence_chunk(x.detach(), mesh.tp) if mesh.sequence_parallel else x


def gather_vocabulary(logits: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    """Gather logits over vocabulary shards, `[..., v/t]` to `[..., v]`; no gradient."""
    if mesh.tp.size == 1:
        return logits
    # Shards may differ by a few columns but the parts of an all-gather may not, so pad.
    chunk = -(-vocab_size // mesh.tp.size)
    padded = torch.nn.functional.pad(logits.detach(), (0, chunk - logits.shape[-1]))
    gathered = all_gather(padded.movedim(-1, 0), mesh.tp)
    return gathered[:vocab_size].movedim(0, -1)
