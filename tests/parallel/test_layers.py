"""Every parallel layer equals the dense one: output, input gradient and every weight gradient.

The output shows a bias added t times or a lost partial sum; the input gradient, a wrong conjugate
mapping; the weight gradient, a sequence shard in place of the full sequence; the bias gradient, a
partial sum that is not completed.
"""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from configs.weights import WeightSpec, column_weights, row_weights
from ops.matmul import Choice, Precision, use_precision
from parallel import (
    MergedColumnParallelLinear,
    Mesh,
    RowParallelLinear,
    VocabParallelEmbedding,
    initialise_parameters,
    local_shards,
    lookup,
    sequence_shard,
    sum_over,
    vocab_parallel_logits,
    vocab_parallel_loss,
)
from parallel import loss as loss_module
from parallel.mappings import enter_tensor_parallel_region
from parallel.parameters import shard_range
from tests.distributed import DEVICE, ONE_RANK, OVERLAPPED, TENSOR_PARALLEL, Layout, distributed
from tests.parallel.test_mappings import seeded
from tests.weights import fill as fill_shards
from tests.weights import gradient_shards

LAYOUTS = (ONE_RANK, *TENSOR_PARALLEL)
LINEAR_LAYOUTS = (*LAYOUTS, *OVERLAPPED)
S, B, H = 16, 2, 12


def column_linear(mesh: Mesh, **out_sizes: int) -> MergedColumnParallelLinear:
    """A layer with a weight and a bias for each name."""
    weights = {
        f"{weight}.{name}": spec
        for weight, out_size in out_sizes.items()
        for name, spec in column_weights(out_size, H, 1.0).items()
    }
    return MergedColumnParallelLinear(weights, mesh)


def fill(layer: nn.Module) -> dict[str, Tensor]:
    """Set random float64 weights; returns the dense ones, which require gradients."""
    layer.to_empty(device=DEVICE).double()
    shards = local_shards(layer)
    dense = {
        name: seeded(1000 + number, *shard.global_shape)
        for number, (name, shard) in enumerate(shards.items())
    }
    fill_shards(shards, dense)
    return {name: weight.requires_grad_() for name, weight in dense.items()}


def shard_of(full: Tensor, dim: int | None, mesh: Mesh) -> Tensor:
    if dim is None:
        return full
    start, stop = shard_range(full.shape[dim], mesh.tp.size, mesh.tp.rank)
    return full.narrow(dim, start, stop - start)


def assert_gradients(layer: nn.Module, dense: dict[str, Tensor], mesh: Mesh) -> None:
    """Each weight gradient, summed over tp if declared partial, is this rank's part."""
    for name, shard in gradient_shards(layer).items():
        gradient = shard.tensor.clone()
        if shard.grad_is_partial:
            sum_over(mesh.tp, gradient)
        expected = shard_of(dense[name].grad, shard.tp_dim, mesh)
        assert_close(gradient, expected, rtol=1e-12, atol=1e-12, msg=name)


@distributed(*LINEAR_LAYOUTS)
def test_column_equals_dense(mesh: Mesh) -> None:
    """Two weights that share a gather have separate outputs; their input gradients add up."""
    layer = column_linear(mesh, a=8, b=20)
    dense = fill(layer)
    x_dense = seeded(1, S, B, H).requires_grad_()
    x = sequence_shard(x_dense.detach(), mesh).clone().requires_grad_()

    outputs = layer(x)

    loss = torch.zeros((), dtype=torch.float64)
    for number, (name, y) in enumerate(zip(("a", "b"), outputs, strict=True)):
        y_dense = F.linear(x_dense, dense[f"{name}.weight"], dense[f"{name}.bias"])
        assert_close(y, shard_of(y_dense, 2, mesh), rtol=1e-12, atol=1e-12)
        upstream = seeded(50 + number, *y_dense.shape)
        (y_dense * upstream).sum().backward(retain_graph=True)
        loss = loss + (y * shard_of(upstream, 2, mesh)).sum()
    loss.backward()
    assert_close(x.grad, sequence_shard(x_dense.grad, mesh), rtol=1e-12, atol=1e-12)
    assert_gradients(layer, dense, mesh)


@distributed(*LINEAR_LAYOUTS)
@pytest.mark.parametrize("num_row_groups", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_shared_row_groups_equal_dense(mesh: Mesh, num_row_groups: int, has_bias: bool) -> None:
    """Ranks that share a row group compute the same columns, and their gradients add up."""
    weights = column_weights(6 * num_row_groups, H, 1.0, has_bias, num_row_groups)
    weights = {f"kv.{name}": spec for name, spec in weights.items()}
    layer = MergedColumnParallelLinear(weights, mesh)
    dense = fill(layer)
    x_dense = seeded(1, S, B, H).requires_grad_()
    x = sequence_shard(x_dense.detach(), mesh).clone().requires_grad_()

    (y,) = layer(x)
    width = y.shape[-1]  # one group, or several if there are fewer ranks than groups
    y.backward(seeded(50 + mesh.tp.rank, S, B, width))

    y_dense = F.linear(x_dense, dense["kv.weight"], dense.get("kv.bias"))
    for rank in range(mesh.tp.size):
        first = 6 * (rank * num_row_groups // mesh.tp.size)
        columns = y_dense[..., first : first + width]
        if rank == mesh.tp.rank:
            assert_close(y, columns, rtol=1e-12, atol=1e-12)
        columns.backward(seeded(50 + rank, S, B, width), retain_graph=True)
    assert_close(x.grad, sequence_shard(x_dense.grad, mesh), rtol=1e-12, atol=1e-12)
    assert_gradients(layer, dense, mesh)


@distributed(*LINEAR_LAYOUTS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_row_equals_dense(mesh: Mesh, has_bias: bool) -> None:
    """Sharding A by columns changes neither Y nor any gradient, including the bias's."""
    layer = RowParallelLinear(row_weights(H, 8, 1.0, has_bias), mesh)
    dense = fill(layer)
    x_dense = seeded(1, S, B, 8).requires_grad_()
    x = shard_of(x_dense.detach(), 2, mesh).clone().requires_grad_()
    upstream = seeded(2, S, B, H)

    y = layer(x)
    y.backward(sequence_shard(upstream, mesh))

    y_dense = F.linear(x_dense, dense["weight"], dense.get("bias"))
    y_dense.backward(upstream)
    assert_close(y, sequence_shard(y_dense, mesh), rtol=1e-12, atol=1e-12)
    assert_close(x.grad, shard_of(x_dense.grad, 2, mesh), rtol=1e-12, atol=1e-12)
    assert_gradients(layer, dense, mesh)


@distributed(*LINEAR_LAYOUTS)
def test_column_then_row_equals_dense(mesh: Mesh) -> None:
    """Together they are an MLP without communication in between."""
    column = column_linear(mesh, up=16)
    row = RowParallelLinear(row_weights(H, 16, 1.0), mesh)
    up, down = fill(column), fill(row)
    x_dense = seeded(1, S, B, H).requires_grad_()
    x = sequence_shard(x_dense.detach(), mesh).clone().requires_grad_()
    upstream = seeded(2, S, B, H)

    y = row(column(x)[0].tanh())
    y.backward(sequence_shard(upstream, mesh))

    hidden = F.linear(x_dense, up["up.weight"], up["up.bias"]).tanh()
    y_dense = F.linear(hidden, down["weight"], down["bias"])
    y_dense.backward(upstream)
    assert_close(y, sequence_shard(y_dense, mesh), rtol=1e-12, atol=1e-12)
    assert_close(x.grad, sequence_shard(x_dense.grad, mesh), rtol=1e-12, atol=1e-12)
    assert_gradients(column, up, mesh)
    assert_gradients(row, down, mesh)


@distributed(*LAYOUTS)
@pytest.mark.parametrize("vocab_size", [20, 23])
def test_embedding_equals_dense(mesh: Mesh, vocab_size: int) -> None:
    """Ids on any rank, repeated ids, and a vocabulary of 23 rows without padding."""
    layer = VocabParallelEmbedding(WeightSpec((vocab_size, H), tp_dim=0), mesh, torch.float64)
    dense = fill(layer)
    tokens = torch.randint(vocab_size, (S, B), generator=torch.Generator().manual_seed(5))
    tokens[0] = torch.tensor([0, vocab_size - 1])
    upstream = seeded(2, S, B, H)

    y = layer(tokens)
    y.backward(sequence_shard(upstream, mesh))

    y_dense = F.embedding(tokens, dense["weight"])
    y_dense.backward(upstream)
    assert torch.equal(y, sequence_shard(y_dense, mesh))
    assert_gradients(layer, dense, mesh)


def test_lookup_sums_in_float32() -> None:
    """The gradient of a row looked up 4,096 times in bfloat16 is rounded once."""
    table = torch.ones(3, 5, dtype=torch.bfloat16).requires_grad_()
    ids = torch.zeros(4096, dtype=torch.int64)
    upstream = seeded(1, 4096, 5).bfloat16()
    lookup(table, ids, torch.bfloat16).backward(upstream)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[0] = upstream.double().sum(0)
    assert_close(table.grad.double(), expected, rtol=2**-8, atol=0)


@distributed(*LAYOUTS)
@pytest.mark.parametrize("vocab_size", [20, 23])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("rows_at_a_time", [4, 1000])
def test_loss_equals_dense(mesh: Mesh, vocab_size: int, scale: float, rows_at_a_time: int) -> None:
    """Loss, z-loss, dX and dW, with ignored targets, logits of 1e4, in one chunk or several."""
    z_loss_coeff, upstream = 0.1 / scale, 0.3
    table_dense = seeded(1, vocab_size, H).requires_grad_()
    x_dense = (scale * seeded(2, S, B, H)).requires_grad_()
    targets = torch.randint(vocab_size, (S, B), generator=torch.Generator().manual_seed(5))
    targets[2:4] = -100
    table = shard_of(table_dense.detach(), 0, mesh).clone().requires_grad_()
    x = sequence_shard(x_dense.detach(), mesh).clone().requires_grad_()

    logits = (x_dense @ table_dense.T).flatten(0, 1)
    of_rows = F.cross_entropy(logits, targets.flatten(), reduction="none").view(S, B).sum(0)
    expected = of_rows.sum()
    expected_z = (logits.logsumexp(-1) * (targets.flatten() >= 0)).square().sum()
    (upstream * (expected + z_loss_coeff * expected_z)).backward()
    # A smaller shard would have room for one more row, but all ranks must chunk alike.
    largest = -(-vocab_size // mesh.tp.size)
    with patch.dict(loss_module._CHUNK_ELEMENTS, cpu=(rows_at_a_time + 1) * largest - 1):
        losses = vocab_parallel_loss(x, table, targets, vocab_size, mesh, z_loss_coeff)
        with torch.no_grad():
            scored = vocab_parallel_loss(x, table, targets, vocab_size, mesh, z_loss_coeff)
    (upstream * losses.objective).backward()

    close = {"rtol": 1e-10, "atol": 1e-10 * scale}
    assert_close(losses.cross_entropy, expected, **close)
    assert_close(losses.log_z_squared, expected_z, **close)
    assert_close(losses.objective, expected + z_loss_coeff * expected_z, **close)
    assert all(torch.equal(*pair) for pair in zip(losses[:3], scored[:3], strict=True))
    assert losses.of_rows is None
    assert_close(scored.of_rows, of_rows, **close)
    assert_close(x.grad, sequence_shard(x_dense.grad, mesh), **close)
    assert_close(table.grad, shard_of(table_dense.grad, 0, mesh), **close)
    assert (x_dense.grad[2:4] == 0).all()


@distributed(ONE_RANK)
def test_head_gradient_is_not_copied(mesh: Mesh) -> None:
    """Forward computes the gradient, as large as the embedding; backward scales it in place."""
    table, x = seeded(1, 23, H).float().requires_grad_(), seeded(2, S, B, H).float()
    objective = vocab_parallel_loss(x, table, torch.zeros(S, B).long(), 23, mesh).objective
    address = objective.grad_fn.gradients[1].data_ptr()
    objective.backward(retain_graph=True)
    assert table.grad.data_ptr() == address
    with pytest.raises(AssertionError, match="has been differentiated before"):
        objective.backward()


@distributed(*LAYOUTS)
def test_logits_equal_dense(mesh: Mesh) -> None:
    """The gather before the head sums dX over vocabulary shards in backward."""
    table_dense = seeded(1, 23, H).requires_grad_()
    table = shard_of(table_dense.detach(), 0, mesh).clone().requires_grad_()
    x_dense = seeded(2, S, B, H).requires_grad_()
    x = sequence_shard(x_dense.detach(), mesh).clone().requires_grad_()
    upstream = seeded(3, S, B, 23)

    logits = vocab_parallel_logits(x, table, mesh)
    logits.backward(shard_of(upstream, 2, mesh))

    (x_dense @ table_dense.T).backward(upstream)
    assert_close(logits, shard_of(x_dense @ table_dense.T, 2, mesh), rtol=1e-12, atol=1e-12)
    assert_close(x.grad, sequence_shard(x_dense.grad, mesh), rtol=1e-12, atol=1e-12)
    assert_close(table.grad, shard_of(table_dense.grad, 0, mesh), rtol=1e-12, atol=1e-12)


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("choice", ["native", "widened"])
def test_logits_of_bfloat16_are_float32(mesh: Mesh, choice: Choice) -> None:
    """Loss and logits of a bfloat16 head equal float64 ones; gradients are rounded once."""
    h, vocab_size = 64, 23
    x_dense = seeded(2, S, B, h).bfloat16()
    table_dense = (0.7 * seeded(1, vocab_size, h)).bfloat16()
    targets = torch.randint(vocab_size, (S, B), generator=torch.Generator().manual_seed(5))
    exact_x, exact_table = (t.double().requires_grad_() for t in (x_dense, table_dense))
    exact = exact_x @ exact_table.T
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()

    x = sequence_shard(x_dense, mesh).requires_grad_()
    table = shard_of(table_dense, 0, mesh).clone().requires_grad_()
    previous = use_precision(Precision(choice, choice))
    with patch.dict(loss_module._CHUNK_ELEMENTS, cpu=5 * vocab_size):
        logits = vocab_parallel_logits(x, table, mesh)
        losses = vocab_parallel_loss(x, table, targets, vocab_size, mesh)
    losses.objective.backward()
    use_precision(previous)

    assert logits.dtype == torch.float32
    assert_close(logits.double(), shard_of(exact, 2, mesh), rtol=1e-6, atol=2e-5)
    assert_close(losses.cross_entropy.double(), expected, rtol=1e-6, atol=0)
    for mine, whole in ((x, sequence_shard(exact_x.grad, mesh)), (table, exact_table.grad)):
        reference = whole if mine is x else shard_of(whole, 0, mesh)
        scale = reference.abs().max().item()
        assert_close(mine.grad.double(), reference, rtol=2**-7, atol=2**-8 * scale)


@distributed(Layout(tp=2), Layout(tp=4, sp=False))
def test_sequence_parallelism_cannot_be_mixed(mesh: Mesh) -> None:
    """Initialisation names a layer that was created for a mesh with another setting."""
    other = dataclasses.replace(mesh, sequence_parallel=not mesh.sequence_parallel)
    model = nn.ModuleDict(
        {
            "column": column_linear(mesh, up=16),
            "row": RowParallelLinear(row_weights(H, 16, 1.0), other),
        }
    )
    model.to_empty(device=mesh.device)
    with pytest.raises(RuntimeError, match=r"row\.weight was created with tp=\d, sequence_para"):
        initialise_parameters(model, 1, mesh)


@distributed(*TENSOR_PARALLEL)
def test_entering_a_region_restores_the_sequence(mesh: Mesh) -> None:
    """Every rank gets all positions in order."""
    x = seeded(1, S, B, H)
    assert torch.equal(enter_tensor_parallel_region(sequence_shard(x, mesh), mesh), x)
