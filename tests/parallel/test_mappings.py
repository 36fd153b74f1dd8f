"""The mappings equal their formulas, and each backward is the transpose of its forward."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from parallel import Mesh, gather_vocabulary, sequence_shard
from parallel.mappings import (
    copy_to_ranks,
    enter_tensor_parallel_region,
    exit_tensor_parallel_region,
    gather_sequence,
    reduce_over_ranks,
    reduce_scatter_sequence,
    replicate_sequence,
    split_sequence,
)
from parallel.mesh import Axis
from parallel.parameters import shard_range
from tests.distributed import ONE_RANK, Layout, distributed

TWO_AND_FOUR = (Layout(tp=2), Layout(tp=4))
MAPPINGS = {
    "copy": (copy_to_ranks, reduce_over_ranks),
    "reduce": (reduce_over_ranks, copy_to_ranks),
    "gather": (gather_sequence, reduce_scatter_sequence),
    "reduce_scatter": (reduce_scatter_sequence, gather_sequence),
    "replicate": (replicate_sequence, split_sequence),
    "split": (split_sequence, replicate_sequence),
}


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def every_ranks(seed: int, mesh: Mesh, *shape: int) -> list[Tensor]:
    """The tensor of each tp rank, all different."""
    return [seeded(100 * seed + rank, *shape) for rank in range(mesh.tp.size)]


@distributed(*TWO_AND_FOUR)
@pytest.mark.parametrize("name", MAPPINGS)
def test_forward_and_backward_equal_the_formulas(mesh: Mesh, name: str) -> None:
    """Backward is the forward of the conjugate mapping."""
    t, rank = mesh.tp.size, mesh.tp.rank

    def formula(kind: str, inputs: list[Tensor]) -> Tensor:
        if kind == "copy":
            return inputs[rank]
        if kind in ("gather", "replicate"):
            return torch.cat(inputs)
        if kind == "split":
            return inputs[rank].chunk(t)[rank]
        total = torch.stack(inputs).sum(0)
        return total if kind == "reduce" else total.chunk(t)[rank]

    conjugate = {"copy": "reduce", "reduce": "copy", "gather": "reduce_scatter"}
    conjugate |= {"reduce_scatter": "gather", "replicate": "split", "split": "replicate"}
    inputs = every_ranks(1, mesh, 2 * t, 3)
    x = inputs[rank].clone().requires_grad_()

    y = MAPPINGS[name][0](x, mesh.tp)
    grads = every_ranks(2, mesh, *y.shape)
    y.backward(grads[rank])

    assert_close(y, formula(name, inputs), rtol=0, atol=1e-13)
    assert x.grad is not None
    assert_close(x.grad, formula(conjugate[name], grads), rtol=0, atol=1e-13)


@distributed(*TWO_AND_FOUR)
@pytest.mark.parametrize("name", MAPPINGS)
def test_pairs_are_conjugate(mesh: Mesh, name: str) -> None:
    """<A x, y> = <x, A' y> for the mapping A and its conjugate A'.

    The tensors of all ranks form one vector: concatenated if they differ, else counted once.
    """

    def inner(a: Tensor, b: Tensor, same_on_all_ranks: bool) -> Tensor:
        total = (a * b).sum()
        if not same_on_all_ranks:
            dist.all_reduce(total, group=mesh.tp.group)
        return total

    forward: Callable[[Tensor, Axis], Tensor]
    forward, transposed = MAPPINGS[name]
    from_same, to_same = name in ("copy", "split"), name in ("reduce", "replicate")
    x = seeded(10 if from_same else 10 + mesh.tp.rank, 2 * mesh.tp.size, 3)
    image = forward(x, mesh.tp)
    y = seeded(20 if to_same else 20 + mesh.tp.rank, *image.shape)

    before = inner(image, y, same_on_all_ranks=to_same)
    after = inner(x, transposed(y, mesh.tp), same_on_all_ranks=from_same)
    assert_close(before, after, rtol=1e-13, atol=1e-13)


@distributed(*TWO_AND_FOUR)
def test_what_follows_a_gather_decides_its_backward(mesh: Mesh) -> None:
    """Duplicated compute needs the split, tensor-parallel compute the reduce-scatter.

    The wrong one is off by a factor of t, or lacks the other ranks' contributions.
    """
    t, rank = mesh.tp.size, mesh.tp.rank
    whole = seeded(1, 2 * t, 3)
    weight = seeded(2, 3, 5 * t)  # a rank has five columns
    mine = slice(5 * rank, 5 * rank + 5)

    def gradient(gather: Callable[[Tensor, Axis], Tensor], columns: slice) -> Tensor:
        x = whole.chunk(t)[rank].clone().requires_grad_()
        (gather(x, mesh.tp) @ weight[:, columns]).tanh().sum().backward()
        assert x.grad is not None
        return x.grad

    dense = whole.clone().requires_grad_()
    (dense @ weight).tanh().sum().backward()
    assert dense.grad is not None
    expected = dense.grad.chunk(t)[rank]
    assert_close(gradient(gather_sequence, mine), expected, rtol=0, atol=1e-12)
    assert_close(gradient(replicate_sequence, slice(None)), expected, rtol=0, atol=1e-12)
    assert_close(gradient(gather_sequence, slice(None)), t * expected, rtol=0, atol=1e-12)
    assert (gradient(replicate_sequence, mine) - expected).abs().max() > 0.01


@distributed(*TWO_AND_FOUR)
@pytest.mark.parametrize("name", MAPPINGS)
def test_inputs_are_not_written_to(mesh: Mesh, name: str) -> None:
    """A collective in place would change a tensor that autograd has saved."""
    x = seeded(mesh.tp.rank, 2 * mesh.tp.size, 3)
    before = x.clone()
    MAPPINGS[name][0](x, mesh.tp)
    assert torch.equal(x, before)


@distributed(ONE_RANK)
def test_one_rank_is_the_identity(mesh: Mesh) -> None:
    """At t = 1 mappings return their input."""
    x = seeded(1, 4, 3)
    assert not mesh.sequence_parallel
    assert enter_tensor_parallel_region(x, mesh) is x
    assert exit_tensor_parallel_region(x, mesh) is x
    assert sequence_shard(x, mesh) is x


@distributed(*TWO_AND_FOUR)
def test_vocabulary_gather_undoes_uneven_shards(mesh: Mesh) -> None:
    """Seven columns over two or four ranks are gathered in order, without padding."""
    logits = seeded(3, 2, 5, 7)
    start, stop = shard_range(7, mesh.tp.size, mesh.tp.rank)
    assert torch.equal(gather_vocabulary(logits[..., start:stop], mesh, 7), logits)
