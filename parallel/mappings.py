"""The mappings between regions, as conjugate pairs of autograd functions.

    forward                       backward
    copy            x             all-reduce         \\  conjugate: without sequence parallelism,
    reduce          all-reduce    g                  /   every rank has all positions
    gather          all-gather    reduce-scatter     \\  conjugate: with sequence parallelism,
    reduce_scatter  reduce-scatter  all-gather       /   a rank has s/t positions
    replicate       all-gather    split              \\  conjugate: from shards to compute that
    split           own positions all-gather         /   every rank repeats, and back

Each backward is the forward of its conjugate: if A maps ranks' inputs to ranks' outputs, the other
is A transposed. All act on dim 0, the sequence, of `[s, b, h]`. An all-reduce is a reduce-scatter
followed by an all-gather, so in forward the first two pairs move the same bytes.

[Note: two gathers]
`gather` and `replicate` do the same in forward. After `gather` each rank computes something else
(its columns of a product), so a position's gradient is the sum of what all ranks say of it. After
`replicate` all ranks compute the same, each already has the whole gradient, and a rank keeps that
of its own positions: to sum them would make it t times too large.

`enter_tensor_parallel_region` and `exit_tensor_parallel_region` are the only code for activations
that asks whether sequence parallelism is on.

Sources: Shoeybi et al. 2019 (f and g), Korthikanti et al. 2022, section 4.2.2 (g and g-bar).
"""

from typing import Any

import torch
from torch import Tensor

from parallel.collectives import all_gather, all_reduce, local_sequence_chunk, reduce_scatter
from parallel.mesh import Axis, Mesh


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grad, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_scatter(grad, ctx.axis), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grad, ctx.axis), None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return local_sequence_chunk(grad, ctx.axis), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return local_sequence_chunk(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grad, ctx.axis), None


def copy_to_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The same x on every rank of the axis; backward sums the gradients."""
    return _Copy.apply(x, axis)


def reduce_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis, on every rank."""
    return _Reduce.apply(x, axis)


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """All positions from every rank's shard, `[s/t, ...]` to `[s, ...]`.

    For tensor-parallel compute: each rank computes something else with the result, so backward
    sums over ranks: a reduce-scatter.
    """
    return _Gather.apply(x, axis)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the axis; each rank keeps its positions, `[s, ...]` to `[s/t, ...]`."""
    return _ReduceScatter.apply(x, axis)


def replicate_sequence(x: Tensor, axis: Axis) -> Tensor:
    """All positions from every rank's shard, `[s/t, ...]` to `[s, ...]`.

    For compute that every rank repeats with the same result, so backward is a split: see [Note:
    two gathers].
    """
    return _Replicate.apply(x, axis)


def split_sequence(x: Tensor, axis: Axis) -> Tensor:
    """This rank's positions of what every rank has computed alike, `[s, ...]` to `[s/t, ...]`."""
    return _Split.apply(x, axis)


def enter_tensor_parallel_region(x: Tensor, mesh: Mesh) -> Tensor:
    """From where norms and dropout work to where matrices are split; result `[s, b, h]`."""
    if mesh.tp.size == 1:
        return x
    return gather_sequence(x, mesh.tp) if mesh.sequence_parallel else copy_to_ranks(x, mesh.tp)


def exit_tensor_parallel_region(x: Tensor, mesh: Mesh) -> Tensor:
    """Sum partial results over tp; `[s/t, b, h]`, or `[s, b, h]` without sequence parallelism."""
    if mesh.tp.size == 1:
        return x
    if mesh.sequence_parallel:
        return reduce_scatter_sequence(x, mesh.tp)
    return reduce_over_ranks(x, mesh.tp)


def sequence_shard(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's positions of something that every rank has in full, `[s, ...]` to `[s/t, ...]`.

    For data (token positions); no gradient passes.
    """
    if not mesh.sequence_parallel:
        return x
    return local_sequence_chunk(x.detach(), mesh.tp)


def gather_vocabulary(logits: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    """Whole rows of logits from vocabulary shards, `[..., v/t]` to `[..., v]`; no gradient."""
    if mesh.tp.size == 1:
        return logits
    # Shards may differ by a few columns, a collective's pieces may not: pad, gather, and cut.
    chunk = -(-vocab_size // mesh.tp.size)
    padded = torch.nn.functional.pad(logits.detach(), (0, chunk - logits.shape[-1]))
    gathered = all_gather(padded.movedim(-1, 0), mesh.tp)
    return gathered[:vocab_size].movedim(0, -1)
