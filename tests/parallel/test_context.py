"""Context parallelism equals one process: a layer, its gradients, its traffic and its memory."""

import dataclasses
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from configs import parse_config
from configs.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    Recompute,
    TrainConfig,
)
from data.loader import BatchLoader, StepBatch
from data.rows import MicroBatch
from model import GPT, build_model
from model.context import make_attention_context
from model.gpt import Block
from ops.balance import balanced_positions
from ops.dropout import dropout_keys, keep_mask, site_index
from ops.sdpa import sdpa
from ops.segments import make_key_blocks
from ops.torch_dry_run import TorchDispatchMode
from parallel import (
    DropoutStream,
    LocalShard,
    Mesh,
    compare_replicas,
    context_parallel_attention,
    initialise_parameters,
    local_gradients,
    local_shards,
    sum_over,
    sum_partial_gradients,
)
from parallel.transport.traffic import Collective, record_traffic
from planning.dry_run import dry_run
from planning.page import page
from tests.distributed import DEVICE, Layout, distributed, run_on
from tests.parallel.test_mappings import seeded
from tests.reference import document_numbers, reference_losses
from training.optimizer import build_optimizer
from training.state import Run, RunState, problem_on
from training.step import train_step

S, B, VOCAB, SEED, STEP, SAMPLES = 16, 2, 23, 1, 3, (7, 8)
TINY = ModelConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=4,
    seq_length=S,
    hidden_dropout=0.1,
    # Ten times the default: attention is far from uniform, so gradients do not cancel.
    init_method_std=0.2,
)
ROPE: dict[str, Any] = {"position_embedding_type": "rope", "normalization": "RMSNorm"}
OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, two groups": {**ROPE, "num_query_groups": 2, "activation": "swiglu"},
    "rope, one group, qk norm": {**ROPE, "num_query_groups": 1, "qk_layernorm": True},
    "partial rope, wide heads": {**ROPE, "kv_channels": 10, "rotary_percent": 0.6},
}
if DEVICE == "cuda":  # whose kernels take heads in multiples of 8 channels
    del OPTIONS["partial rope, wide heads"]
GATHERED = (Layout(cp=2), Layout(cp=4), Layout(tp=2, cp=2), Layout(cp=2, dp=2))
RINGS = tuple(dataclasses.replace(layout, cp_comm_type="p2p") for layout in GATHERED)
EVERY_LAYOUT = (*GATHERED, *RINGS)
OVERLAPPED = (
    Layout(tp=2, cp=2, overlap="backward", shared_memory=True),
    Layout(tp=2, cp=2, overlap="backward", cp_comm_type="p2p", shared_memory=True),
    Layout(tp=2, cp=2, sp=False),
)


def tiny_model(mesh: Mesh, config: ModelConfig, recompute: Recompute = "none") -> GPT:
    """A float32 GPT with random weights, biases and norms: zeros and ones would hide mistakes."""
    parallel = ParallelConfig(recompute_granularity=recompute)
    data, train = DataConfig(vocab_size=VOCAB), TrainConfig(precision="fp32")
    model = build_model(Config(model=config, data=data, train=train, parallel=parallel), mesh)
    for number, (name, shard) in enumerate(local_shards(model).items()):
        if name.endswith("bias") or "norm" in name:
            noise = torch.randn(shard.global_shape, generator=torch.Generator().manual_seed(number))
            shard.tensor.add_(0.3 * noise[shard.slices])
    return model


def whole(shards: dict[str, LocalShard], mesh: Mesh) -> dict[str, Tensor]:
    """The full tensors of all ranks' shards, in float64."""
    full = {}
    for name, shard in shards.items():
        tensor = torch.zeros(shard.global_shape, dtype=torch.float64)
        if shard.tp_dim is not None or mesh.tp.rank == 0:
            tensor[shard.slices] = shard.tensor.double()
        full[name] = sum_over(mesh.world, tensor)
    return full


def full_batch(has_documents: bool) -> MicroBatch:
    """Two rows, the second one padded, of one or several documents."""
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(VOCAB, (B, S), generator=generator) for _ in range(2))
    columns, padding = torch.arange(S).expand(B, S), torch.zeros(B, S, dtype=torch.bool)
    padding[1, 13:] = True
    documents, positions = None, columns
    if has_documents:
        documents = [[0, 7], [0, 3, 9, 12, 13]]
        numbers = document_numbers(documents, S)
        positions = columns - torch.searchsorted(numbers, numbers)
    return MicroBatch(
        tokens,
        targets.masked_fill(padding, -100),
        positions.masked_fill(padding, 0),
        torch.tensor(SAMPLES),
        int((~padding).sum()),
        documents,
        dropout_keys(SEED, STEP, SAMPLES, 1).to(DEVICE),
    )


def dropout_mask(shape: tuple[int, ...], layer: int, site: int) -> Tensor:
    b, s, h = shape
    keys = dropout_keys(SEED, STEP, SAMPLES, 1)[site_index(layer, site)].to(DEVICE)
    return keep_mask(torch.Size((s, b, h)), 0, 0.1, keys).transpose(0, 1).double() / 0.9


@distributed(*EVERY_LAYOUT, *OVERLAPPED)
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_equals_the_dense_reference(mesh: Mesh, options: str, has_documents: bool) -> None:
    """Loss and every gradient, with dropout, padding and documents; within 2e-5 in float32."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    dense = {n: t.requires_grad_() for n, t in whole(local_shards(model), mesh).items()}
    batch = full_batch(has_documents)
    mine = batch.of_cp_rank(mesh.cp.rank, mesh.cp.size)
    stream = DropoutStream(SEED, STEP, SAMPLES[0], batch.dropout_keys)
    losses = model(**mine.inputs(), stream=stream)
    (losses.objective / mesh.dp.size).backward()  # dp ranks have equal batches
    sum_partial_gradients(local_gradients(model), mesh)
    loss = sum_over(mesh.dp_cp, losses.cross_entropy.double() / mesh.dp.size)

    inputs = (batch.tokens, batch.positions, batch.targets, dropout_mask, batch.documents)
    expected, _ = reference_losses(dense, config, *inputs)
    expected.backward()
    assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = whole(local_shards(model, lambda parameter: parameter.grad), mesh)
    for name, gradient in gradients.items():
        scale = dense[name].grad.abs().max().item()
        assert_close(gradient, dense[name].grad, rtol=0, atol=2e-5 * scale, msg=name)


@distributed(GATHERED[0], RINGS[1], Layout(tp=2, cp=2, overlap="backward"))
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(mesh: Mesh, recompute: Recompute) -> None:
    """Every gradient is bit-identical, with dropout and documents."""
    config = dataclasses.replace(TINY, **OPTIONS["rope, two groups"])
    batch = full_batch(has_documents=True).of_cp_rank(mesh.cp.rank, mesh.cp.size)
    stream = DropoutStream(SEED, STEP, SAMPLES[0], batch.dropout_keys)
    gradients = []
    for granularity in ("none", recompute):
        model = tiny_model(mesh, config, granularity)
        model(**batch.inputs(), stream=stream).objective.backward()
        sum_partial_gradients(local_gradients(model), mesh)
        gradients.append(local_shards(model, lambda parameter: parameter.grad))
    for name, shard in gradients[0].items():
        assert torch.equal(shard.tensor, gradients[1][name].tensor), name


@distributed(Layout(cp=2), Layout(cp=2, dp=2))
def test_a_wrong_gathered_weight_names_both_axes(mesh: Mesh) -> None:
    """FSDP2 gathers over dp and cp ranks, so the replica check compares all of these."""
    model = tiny_model(mesh, TINY)
    assert compare_replicas(model, {}, mesh) == []
    block: Any = model.blocks[0]
    gather = block.unshard

    def gather_badly() -> None:
        gather()
        if mesh.world.rank == 0:
            block.mlp.down.weight.detach().view(-1)[0] += 1

    block.unshard = gather_badly
    (mismatch,) = compare_replicas(model, {}, mesh)
    assert mismatch.startswith("gathered blocks.0.mlp.down.weight on rank ")
    assert mismatch.endswith(f" (of dp x cp ranks {[*range(mesh.world.size)]})")


@distributed(GATHERED[1], RINGS[1])
def test_attention_in_bf16_is_rounded_once(mesh: Mesh) -> None:
    """Outputs are merged in float32, so the error is about that of one kernel call."""
    s, columns = 64, balanced_positions(64, mesh.cp.rank, mesh.cp.size)
    q, k, v = (seeded(number, s, 1, 2, 16).bfloat16() for number in range(3))
    exact = sdpa(q.double(), k.double(), v.double(), None, 0.0)
    blocks = make_key_blocks(s, None, mesh.cp.rank, mesh.cp.size)
    split = context_parallel_attention(q[columns], k[columns], v[columns], blocks, mesh)
    squared = [(split - exact[columns]).square().sum(), (sdpa(q, k, v, None, 0.0) - exact).square()]
    total = sum_over(mesh.cp, squared[0].clone())
    assert total.sqrt() < 1.3 * squared[1].sum().sqrt()


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_equal_work(size: int) -> None:
    """Each position is on one rank, and the queries of each rank see equally many keys."""
    owned = [balanced_positions(64, rank, size) for rank in range(size)]
    assert torch.cat(owned).sort().values.tolist() == list(range(64))
    assert len({int((positions + 1).sum()) for positions in owned}) == 1


@distributed(*EVERY_LAYOUT)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("groups", [4, 1])
def test_traffic_equals_the_formula(mesh: Mesh, recompute: Recompute, groups: int) -> None:
    """A rank sends (c - 1) / c M in forward and twice that in backward; M = 2 s b max(1, g / t) d.

    Full recomputation repeats the forward. A ring sends the same bytes, in c - 1 shifts.
    """
    config = dataclasses.replace(TINY, num_query_groups=groups)
    block = Block(config, 0, mesh, recompute)
    block.to_empty(device="cpu")
    initialise_parameters(block, 1, mesh)
    c, t = mesh.cp.size, mesh.tp.size
    positions = balanced_positions(S, mesh.cp.rank, c).unsqueeze(1).expand(-1, B)
    blocks = make_key_blocks(S, None, mesh.cp.rank, c)
    context = make_attention_context(config, positions, blocks, None, torch.float32)
    x = seeded(1, S // c // t, B, config.hidden_size).float().requires_grad_()
    ranks = tuple(torch.distributed.get_process_group_ranks(mesh.cp.group))
    recorded = []
    with record_traffic() as traffic:
        y = block(x, context)
        recorded.append(over_ranks(traffic, ranks))
        traffic.clear()
        y.sum().backward()
        recorded.append(over_ranks(traffic, ranks))

    full_bytes = 2 * S * B * max(1, groups // t) * config.head_dim * 4
    if mesh.cp_comm_type == "all_gather":
        gather, scatter = (
            Collective(kind, ranks, torch.float32, full_bytes)
            for kind in ("all_gather", "reduce_scatter")
        )
        forward, backward = Counter([gather]), Counter([gather, scatter])
    else:
        shift = [Collective(k, ranks, torch.float32, full_bytes // c) for k in ("send", "recv")]
        forward, backward = Counter(shift * (c - 1)), Counter(shift * (2 * (c - 1)))
    assert recorded == [forward, backward + (forward if recompute == "full" else Counter())]
    sent = sum(one.sent_bytes * number for one, number in forward.items())
    assert sent == (c - 1) * full_bytes / c


def over_ranks(traffic: list[Collective], ranks: tuple[int, ...]) -> Counter[Collective]:
    return Counter(collective for collective in traffic if collective.ranks == ranks)


def planned_config(*overrides: str) -> Config:
    arguments = (
        "config=gpt_debug.yaml",
        "model.num_layers=3",
        "model.hidden_dropout=0.1",
        "model.seq_length=128",
        "data.vocab_size=601",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        *overrides,
    )
    return parse_config(list(arguments), lambda _: 2)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_layer_saves_its_share(recompute: str) -> None:
    """Each module saves 1/c of the bytes that it saves without context parallelism."""
    recomputed = f"parallel.recompute_granularity={recompute}"
    alone = dry_run(planned_config(recomputed), 2)  # dp = 2, so that FSDP2 gathers weights too
    for comm_type in ("all_gather", "p2p"):
        cp = "parallel.context_parallel_size=2", f"parallel.cp_comm_type={comm_type}"
        shared = dry_run(planned_config(recomputed, *cp), 2)
        for one, whole_row in zip(shared.saved_in_layer, alone.saved_in_layer, strict=True):
            assert (one.module, 2 * one.num_bytes) == (whole_row.module, whole_row.num_bytes)


def compare_step(mesh: Mesh, config: Config, expected: Counter[Collective]) -> None:
    """Compare the collectives of a real step on rank 0."""
    model = build_model(config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    run = SimpleNamespace(config=config, mesh=mesh, model=model, optimizer=optimizer)
    b, s = config.train.micro_batch_size, config.model.seq_length
    tokens, positions = torch.zeros(b, s, dtype=torch.int64), torch.arange(s).repeat(b, 1)
    keys = dropout_keys(0, 0, range(b), config.model.num_layers)
    batch = MicroBatch(tokens, tokens, positions, torch.arange(b), b * s, None, keys)
    step = StepBatch([batch.of_cp_rank(mesh.cp.rank, mesh.cp.size)] * 2, 2 * b * s, 1)
    with record_traffic() as traffic:
        train_step(cast(Run, run), RunState(wandb_id=""), cast(BatchLoader, iter([step])))
    if mesh.world.rank == 0:
        assert Counter(traffic) == expected


@pytest.mark.parametrize("layout", [GATHERED[0], RINGS[0]], ids=str)
def test_a_step_sends_what_plan_reports(layout: Layout) -> None:
    """plan.py separates the traffic of cp from that of FSDP2, which here has the same ranks."""
    cp = "parallel.context_parallel_size=2", f"parallel.cp_comm_type={layout.cp_comm_type}"
    config = planned_config(*cp)
    plan = dry_run(config, 2)
    run_on(layout, compare_step, config=config, expected=plan.step)
    assert math.isclose(
        sum(one.sent_bytes * n for one, n in plan.traffic["cp  one layer, backward"].items()),
        2 * sum(one.sent_bytes * n for one, n in plan.traffic["cp  one layer, forward"].items()),
    )
    text = page(config, plan, memory_gib=80)
    assert f"x context parallel 2, {layout.cp_comm_type}" in text
    assert "fsdp  one micro-batch, forward" in text


class QuadraticTensors(TorchDispatchMode):
    """Collects the shapes of tensors with more than one dimension of some sizes."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.found = sizes, set[torch.Size]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = {leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        self.found |= {shape for shape in shapes if sum(n in self.sizes for n in shape) > 1}
        return result


@distributed(Layout(), GATHERED[0], RINGS[0])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_documents_need_no_mask(mesh: Mesh, recompute: Recompute) -> None:
    """No tensor of a step has two dimensions of size s, or of a part of s."""
    s, c = 104, mesh.cp.size
    sizes = {s, s // c, s // 2 // c}
    with QuadraticTensors(sizes) as watch:
        torch.ones(B, s, s // c)
    assert watch.found == {(B, s, s // c)}
    config = dataclasses.replace(TINY, seq_length=s, num_query_groups=2)
    model = tiny_model(mesh, config, recompute)
    tokens, positions = torch.zeros(B, s, dtype=torch.int64), torch.arange(s).repeat(B, 1)
    documents = [[0, 60], [0, 3, 9, 80]]
    with QuadraticTensors(sizes) as watch:
        batch = MicroBatch(tokens, tokens, positions, torch.arange(B), B * s, documents)
        model(**batch.of_cp_rank(mesh.cp.rank, c).inputs()).objective.backward()
    assert watch.found == set()


def test_heads_that_gpus_cannot_split_are_refused() -> None:
    """CUDA's kernels take multiples of 8 channels; without cp torch pads others itself."""
    config = Config(
        model=ModelConfig(kv_channels=12), parallel=ParallelConfig(context_parallel_size=2)
    )
    problem = problem_on("cuda", config)
    assert problem is not None
    assert "multiple of 8, not 12; set model.kv_channels=16," in problem
    assert problem_on("cpu", config) is None
    assert problem_on("cuda", dataclasses.replace(config, parallel=ParallelConfig())) is None
