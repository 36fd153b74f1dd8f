"""Recorded communication equals the formulas; no number here was copied from an output.

M is the bytes of a full `[s, b, h]` activation. The expected collectives are those of Korthikanti
et al. 2022, section 4.2.2 (arXiv 2205.05198).
"""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import set_checkpoint_early_stop

from configs.schema import ModelConfig, Recompute
from model.context import make_attention_context
from model.gpt import Block
from parallel import (
    Mesh,
    any_rank,
    gather_json,
    initialise_parameters,
    local_gradients,
    sum_partial_gradients,
)
from parallel.transport.traffic import Collective, record_traffic
from tests.distributed import ONE_RANK, OVERLAPPED, TENSOR_PARALLEL, Layout, distributed
from tests.model.test_gpt import OPTIONS, STREAM, TINY, VOCAB, batch, clip, tiny_model
from tests.parallel.test_mappings import seeded
from tests.weights import gradient_shards

S, B, H, L = 12, 2, TINY.hidden_size, TINY.num_layers
GATHER, SCATTER, REDUCE = "all_gather", "reduce_scatter", "all_reduce"
WITH_DROPOUT = dataclasses.replace(TINY, hidden_dropout=0.1, attention_dropout=0.1)

every_option = pytest.mark.parametrize("options", OPTIONS)


def over_tp(mesh: Mesh, kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Collective:
    """The collective of a full tensor of that shape, where dp is 1."""
    return Collective(kind, tuple(range(mesh.tp.size)), dtype, math.prod(shape) * dtype.itemsize)


def activations(mesh: Mesh, *kinds: str, dtype: torch.dtype = torch.float32) -> list[Collective]:
    return [over_tp(mesh, kind, S, B, H, dtype=dtype) for kind in kinds]


def block_traffic(
    mesh: Mesh,
    config: ModelConfig,
    *,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.float32,
    s: int = S,
) -> tuple[list[Collective], list[Collective]]:
    """The collectives of one block in forward and in backward."""
    block = Block(config, 0, mesh, recompute)
    block.to_empty(device=mesh.device)
    initialise_parameters(block, 1, mesh)
    block.to(dtype)
    positions = torch.arange(s).unsqueeze(1).expand(s, B)
    context = make_attention_context(config, positions, None, STREAM, dtype)
    local_s = s // mesh.tp.size if mesh.sequence_parallel else s
    x = seeded(1, local_s, B, H).to(dtype).requires_grad_()
    with record_traffic() as forward:
        y = block(x, context)
    with record_traffic() as backward:
        y.backward(seeded(2, *y.shape).to(dtype))
    assert x.grad is not None
    return forward, backward


def total_sent(traffic: list[Collective]) -> float:
    return sum(collective.sent_bytes for collective in traffic)


@distributed(*TENSOR_PARALLEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_option
def test_block_traffic(mesh: Mesh, options: str, dtype: torch.dtype) -> None:
    """With sequence parallelism 2 AG + 2 RS forward, 2 AG + 2 RS backward; without, 2 AR and 2 AR.

    The paper counts 4 AG + 2 RS in backward: it saves the shard of a column-parallel layer's input
    and gathers it again for dW. Without overlap we save the gathered input. So each direction sends
    4 (t - 1) / t M with any options.
    """
    config = dataclasses.replace(WITH_DROPOUT, **OPTIONS[options])
    forward, backward = block_traffic(mesh, config, dtype=dtype)

    kinds = (GATHER, SCATTER) * 2 if mesh.sequence_parallel else (REDUCE,) * 2
    # Backward reverses the order and swaps gathers and reduce-scatters: the same sequence.
    assert forward == backward == activations(mesh, *kinds, dtype=dtype)
    t, full_bytes = mesh.tp.size, S * B * H * dtype.itemsize
    assert total_sent(forward) == total_sent(backward) == 4 * (t - 1) * full_bytes / t


@distributed(*(layout for layout in OVERLAPPED if layout.tp > 1))
@pytest.mark.parametrize("recompute", ["none", "selective"])
@every_option
def test_overlapped_block_traffic(mesh: Mesh, options: str, recompute: Recompute) -> None:
    """The paper's count: 2 AG + 2 RS forward, 4 AG + 2 RS backward, as the shard is saved.

    Without sequence parallelism there is nothing to gather again: 2 AR and 2 AR. Selective
    recomputation does not communicate.
    """
    config = dataclasses.replace(WITH_DROPOUT, **OPTIONS[options])
    forward, backward = block_traffic(mesh, config, recompute=recompute, s=16)

    t, full_bytes = mesh.tp.size, 16 * B * H * 4
    assert total_sent(forward) == 4 * (t - 1) * full_bytes / t
    if not mesh.sequence_parallel:
        assert [collective.kind for collective in forward + backward] == [REDUCE] * 4
        return
    assert total_sent(backward) == 6 * (t - 1) * full_bytes / t
    assert [c.kind for c in forward] == [GATHER, SCATTER] * 2
    assert [c.kind for c in backward] == [GATHER, GATHER, SCATTER] * 2


@distributed(*TENSOR_PARALLEL)
@every_option
def test_recomputed_block_traffic(mesh: Mesh, options: str) -> None:
    """Full recomputation adds the forward's collectives to the backward, all but the last one.

    torch stops recomputing once it has every tensor that forward saved. The last one is the input
    of the MLP's second matrix. The reduce-scatter (or all-reduce), the bias and the dropout after
    it save no tensor, so they are not run again, except without that early stop. Backward starts
    with operations that need no saved tensor: dropout, and the gather of its gradient.
    """
    config = dataclasses.replace(WITH_DROPOUT, **OPTIONS[options])
    plain_forward, plain_backward = block_traffic(mesh, config)
    forward, backward = block_traffic(mesh, config, recompute="full")
    with set_checkpoint_early_stop(False):
        _, whole_backward = block_traffic(mesh, config, recompute="full")

    assert forward == plain_forward
    # The backward of the MLP's exit comes before any recomputation; without sequence parallelism
    # it does not communicate.
    before = activations(mesh, GATHER) if mesh.sequence_parallel else []
    after = plain_backward[len(before) :]
    assert plain_backward == [*before, *after]
    assert backward == [*before, *forward[:-1], *after]
    assert whole_backward == [*before, *forward, *after]


@distributed(*(layout for layout in OVERLAPPED if layout.tp > 1))
@every_option
def test_overlapped_and_recomputed_block_traffic(mesh: Mesh, options: str) -> None:
    """Backward repeats the forward's collectives except the MLP's last sum, as without overlap."""
    config = dataclasses.replace(WITH_DROPOUT, **OPTIONS[options])
    _, plain_backward = block_traffic(mesh, config, s=16)
    forward, backward = block_traffic(mesh, config, recompute="full", s=16)
    assert forward[-1].kind == (SCATTER if mesh.sequence_parallel else REDUCE)
    assert Counter(backward) == Counter(plain_backward) + Counter(forward[:-1])


@distributed(*TENSOR_PARALLEL)
@pytest.mark.parametrize("options", ["gpt2", "exact gelu, untied", "llama"])
def test_model_traffic(mesh: Mesh, options: str) -> None:
    """Embedding RS / AG, blocks, head AG / RS, one small float32 AG in the loss, and nothing else.

    Without sequence parallelism AR / nothing, blocks, nothing / AR. Forward computes the gradients
    of the loss, and so includes the RS (or AR) of the head's dX.
    """
    model = tiny_model(mesh, dataclasses.replace(TINY, **OPTIONS[options]))
    with record_traffic() as forward:
        loss = model(*batch(), STREAM).objective
    with record_traffic() as backward:
        loss.backward()

    t = mesh.tp.size
    head = [Collective(GATHER, tuple(range(mesh.tp.size)), torch.float32, t * 2 * S * B * 4)]
    if mesh.sequence_parallel:
        blocks = (GATHER, SCATTER) * 2 * L
        head = [*activations(mesh, GATHER), *head, *activations(mesh, SCATTER)]
        assert forward == [*activations(mesh, SCATTER, *blocks), *head]
        assert backward == activations(mesh, *blocks, GATHER)
    else:
        blocks = (REDUCE,) * 2 * L
        assert forward == [*activations(mesh, REDUCE, *blocks), *head, *activations(mesh, REDUCE)]
        assert backward == activations(mesh, *blocks)


def num_partial(config: ModelConfig, mesh: Mesh) -> int:
    """Number of elements whose gradient is partial, from the equations of the model."""
    h, d, g = config.hidden_size, config.head_dim, config.num_groups
    per_channel = 2 if config.normalization == "LayerNorm" else 1
    count = 0
    if mesh.sequence_parallel:  # each rank has s/t positions
        count += (2 * L + 1) * per_channel * h  # norms
        count += L * 2 * h if config.add_bias_linear else 0  # of proj and down
        count += S * h if config.position_embedding_type == "learned_absolute" else 0
    if config.qk_layernorm:  # each rank has a/t heads
        count += L * 2 * per_channel * d
    if g < mesh.tp.size:  # each rank computes one group of kv, which all have
        count += L * 2 * g * d * (h + (config.add_bias_linear or config.add_qkv_bias))
    return count


@distributed(*TENSOR_PARALLEL)
@every_option
def test_gradient_traffic(mesh: Mesh, options: str) -> None:
    """One AR per step for all partial gradients, and one of a single float64 for the norm.

    The step makes that one together with its other sums.
    """
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    model(*batch(), STREAM).objective.backward()
    with record_traffic() as partial:
        sum_partial_gradients(local_gradients(model), mesh)
    with record_traffic() as clipping:
        clip(model, 1.0, mesh)

    count = num_partial(config, mesh)
    assert partial == ([over_tp(mesh, REDUCE, count)] if count else [])
    if options == "gpt2" and mesh.sequence_parallel:
        assert count == (6 * H * L + 2 * H) + S * H
    assert clipping == [over_tp(mesh, REDUCE, 1, dtype=torch.float64)]


@distributed(ONE_RANK)
@every_option
def test_one_rank_has_no_traffic(mesh: Mesh, options: str) -> None:
    for recompute in ("none", "selective", "full"):
        model = tiny_model(mesh, dataclasses.replace(WITH_DROPOUT, **OPTIONS[options]), recompute)
        with record_traffic() as traffic:
            model(*batch(), STREAM).objective.backward()
            sum_partial_gradients(local_gradients(model), mesh)
        assert traffic == []


@distributed(Layout(dp=2), Layout(tp=2, dp=2))
def test_fsdp_traffic(mesh: Mesh) -> None:
    """FSDP2's collectives are recorded, on dp; a tp axis of one rank has none.

    It gathers a block's weights in forward and again in backward, the root's once, and
    reduce-scatters every gradient once. Rows are padded to a multiple of dp.
    """
    model = tiny_model(mesh)
    with record_traffic() as traffic:
        model(*batch(), STREAM).objective.backward()

    t = mesh.tp.size
    row = mesh.world.rank // t * t
    tp_ranks, dp_ranks = tuple(range(row, row + t)), tuple(range(mesh.tp.rank, 2 * t, t))
    over_dp = [collective for collective in traffic if collective.ranks == dp_ranks]
    in_row = [collective for collective in traffic if collective.ranks == tp_ranks]
    assert len(over_dp) + len(in_row) == len(traffic)
    assert len(in_row) == (0 if t == 1 else 2 * (4 * L + 2) + 1)

    f = 4 * H
    matrices, row_biases, norms = 4 * H * H + 2 * H * f, 2 * H, 4 * H
    block = (matrices + 3 * H + f) // t + row_biases + norms
    rows = -(-VOCAB // t) if mesh.tp.rank == 0 else VOCAB // t
    root = (rows + rows % 2) * H + S * H + 2 * H  # embedding, positions, final norm

    def bytes_of(kind: str) -> list[int]:
        return sorted(collective.full_bytes for collective in over_dp if collective.kind == kind)

    assert bytes_of(SCATTER) == sorted([4 * root, *[4 * block] * L])
    assert bytes_of(GATHER) == sorted([4 * root, *[4 * block] * L * 2])
    assert {collective.kind for collective in over_dp} == {GATHER, SCATTER}


@distributed(Layout(tp=2), Layout(tp=4), Layout(tp=2, dp=2))
def test_control_and_dtensor_collectives_are_recorded(mesh: Mesh) -> None:
    """Collectives of flags and JSON, and DTensor's functional ones."""
    world = mesh.world.size
    with record_traffic() as agreement:
        any_rank(mesh, False)
        gather_json(mesh, "x" * mesh.world.rank)
    everyone = tuple(range(world))
    longest = 2 + world - 1  # two quotation marks
    assert agreement == [
        Collective(REDUCE, everyone, torch.int32, 4),
        Collective(GATHER, everyone, torch.int64, 8 * world),
        Collective(GATHER, everyone, torch.uint8, longest * world),
    ]

    tp_mesh = mesh.device_mesh["tp"]
    whole = DTensor.from_local(torch.ones(3, 5), tp_mesh, [Shard(0)])
    with record_traffic() as traffic:
        total = whole.sum().full_tensor()
        whole.full_tensor()
        whole.softmax(0)  # over the sharded dim: it gathers inside the operation
    assert total == 15 * mesh.tp.size
    gather = (GATHER, mesh.tp.size * 3 * 5 * 4)
    assert [(c.kind, c.full_bytes) for c in traffic] == [(REDUCE, 4), gather, gather]


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, sp=False), Layout(tp=2, dp=2))
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recording_changes_nothing(mesh: Mesh, recompute: str) -> None:
    """The loss and every gradient are bit-identical."""
    seen, unseen = (tiny_model(mesh, WITH_DROPOUT, recompute) for _ in range(2))
    with record_traffic():
        loss = seen(*batch(), STREAM).objective
        loss.backward()
    expected = unseen(*batch(), STREAM).objective
    expected.backward()
    assert torch.equal(loss, expected)
    for model in (seen, unseen):
        sum_partial_gradients(local_gradients(model), mesh)
    expected_gradients = gradient_shards(unseen)
    for name, a in gradient_shards(seen).items():
        assert torch.equal(a.tensor, expected_gradients[name].tensor), name


@pytest.mark.parametrize(
    ("kind", "num_ranks", "sent"),
    [
        # 12 floats. On 4 ranks: 3 rounds of 3 floats, and twice that.
        (GATHER, 4, 36),
        (SCATTER, 4, 36),
        (REDUCE, 4, 72),
        (GATHER, 2, 24),
        (REDUCE, 3, 64),
        (REDUCE, 1, 0),
    ],
)
def test_bytes_on_a_ring(kind: str, num_ranks: int, sent: int) -> None:
    """Counted by hand."""
    collective = Collective(kind, tuple(range(num_ranks)), torch.float32, 48)
    assert collective.sent_bytes == sent


def test_other_kinds_have_no_formula() -> None:
    """A broadcast is recorded, but its ranks send different amounts."""
    with pytest.raises(ValueError, match="kind=broadcast has no formula"):
        _: Any = Collective("broadcast", (0, 1), torch.float32, 48).sent_bytes
