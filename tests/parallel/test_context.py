"""Context parallelism equals one process: a layer, its gradients, its traffic and its memory."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from configs.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from data.rows import MicroBatch
from model import GPT, build_model
from ops.dropout import dropout_keys, keep_mask, site_index
from parallel import DropoutStream, LocalShard, Mesh, local_shards, sum_over, sum_partial_gradients
from tests.distributed import ONE_RANK, Layout, distributed
from tests.reference import reference_losses
from tests.runs import rows, settings, train_on

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
}
GATHERED = (Layout(cp=2), Layout(cp=4), Layout(tp=2, cp=2), Layout(cp=2, dp=2))
EVERY_LAYOUT = (*GATHERED, *(dataclasses.replace(one, cp_comm_type="p2p") for one in GATHERED))


def tiny_model(mesh: Mesh, config: ModelConfig, recompute: str = "none") -> GPT:
    """A float32 GPT with random biases and norms too, as zeros and ones would hide mistakes."""
    parallel = ParallelConfig(recompute_granularity=recompute)  # type: ignore[arg-type]
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
    """Two rows, the second one padded; with documents, of several of them."""
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(VOCAB, (B, S), generator=generator) for _ in range(2))
    columns, padding = torch.arange(S).expand(B, S), torch.zeros(B, S, dtype=torch.bool)
    padding[1, 13:] = True
    first = torch.zeros(B, S, dtype=torch.int64)
    if has_documents:
        first[0, 7:], first[1, 3:], first[1, 9:], first[1, 12:] = 7, 3, 9, 12
    positions = (columns - first).masked_fill(padding, 0)
    return MicroBatch(
        tokens,
        targets.masked_fill(padding, -100),
        positions,
        torch.tensor(SAMPLES),
        int((~padding).sum()),
        first.masked_fill(padding, -1) if has_documents else None,
        dropout_keys(SEED, STEP, SAMPLES, 1),
    )


def dropout_mask(shape: tuple[int, ...], layer: int, site: int) -> Tensor:
    b, s, h = shape
    keys = dropout_keys(SEED, STEP, SAMPLES, 1)[site_index(layer, site)]
    return keep_mask(torch.Size((s, b, h)), 0, 0.1, keys).transpose(0, 1).double() / 0.9


@distributed(*EVERY_LAYOUT)
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
    (losses.objective / mesh.dp.size).backward()  # every dp rank has the same batch, and they add
    sum_partial_gradients(model, mesh)
    loss = sum_over(mesh.dp_cp, losses.cross_entropy.double() / mesh.dp.size)

    inputs = (batch.tokens, batch.positions, batch.targets, dropout_mask, batch.documents)
    expected, _ = reference_losses(dense, config, *inputs)
    expected.backward()
    assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients = whole(local_shards(model, lambda parameter: parameter.grad), mesh)
    for name, gradient in gradients.items():
        scale = dense[name].grad.abs().max().item()
        assert_close(gradient, dense[name].grad, rtol=0, atol=2e-5 * scale, msg=name)


PACKED = (
    "config=llama_debug.yaml",
    "model.num_query_groups=2",
    "model.qk_layernorm=true",
    "data.packing=best_fit",
    "data.inter_document_masking=true",
)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(PACKED, id="rope, best_fit, documents"),
        pytest.param(("data.sequence_mode=pack",), id="learned, pack", marks=pytest.mark.slow),
        pytest.param(("data.sequence_mode=pad",), id="learned, pad", marks=pytest.mark.slow),
    ],
)
def test_runs_give_the_losses_of_one_process(
    corpus: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Six steps with dropout and rows of 117 tokens: losses within 2e-6, norms within 2e-5."""
    layouts = {
        ONE_RANK: 4,
        Layout(cp=2): 8,
        Layout(cp=2, cp_comm_type="p2p"): 2,
        Layout(cp=4, cp_comm_type="p2p"): 4,
        Layout(cp=4): 1,
        Layout(tp=2, cp=2): 2,
        Layout(cp=2, dp=2): 2,
    }
    curves = {}
    for layout, micro_batch_size in layouts.items():
        directory = tmp_path / str(layout)
        overrides = (*options, "model.seq_length=117", f"train.micro_batch_size={micro_batch_size}")
        train_on(layout, settings(corpus, directory, *overrides))
        curves[layout] = rows(directory)
    reference = curves.pop(ONE_RANK)
    assert [row["step"] for row in reference] == [1, 2, 3, 3, 4, 5, 6, 6]
    for layout, curve in curves.items():
        for row, expected in zip(curve, reference, strict=True):
            assert row.keys() == expected.keys()
            for key, value in row.items():
                tolerance = 2e-5 if key == "train/grad_norm" else 2e-6
                place = layout, row["step"], key
                assert value == pytest.approx(expected[key], rel=tolerance), place
