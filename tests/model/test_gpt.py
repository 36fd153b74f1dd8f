"""The model equals the dense reference on every layout: loss and every gradient."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from configs.weights import model_weights
from model import GPT, build_model, flops_per_token, num_parameters
from model.context import make_attention_context
from ops.dropout import keep_mask, site_index
from ops.segments import make_key_blocks
from parallel import (
    DropoutStream,
    Mesh,
    are_finite,
    clip_gradients,
    local_gradients,
    local_shards,
    set_gradient_sync,
    squared_norm,
    sum_on_host,
    sum_over,
    sum_partial_gradients,
)
from tests.distributed import EVERY_LAYOUT, ONE_RANK, OVERLAPPED, Layout, distributed
from tests.parallel.test_mappings import seeded
from tests.reference import document_numbers, reference_logits, reference_losses
from tests.streams import stream
from tests.weights import clone_tensors, fill, full_tensors, gradient_shards

TINY = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    seq_length=12,
    hidden_dropout=0.1,
    # Ten times the default: attention is far from uniform, so gradients do not cancel.
    init_method_std=0.2,
)
VOCAB = 23  # not divisible by 2 or 4
# Combinations that cover every option of the model.
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "exact gelu, untied": {"activation": "gelu", "untie_embeddings_and_output_weights": True},
    "llama": {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "activation": "swiglu",
        "add_bias_linear": False,
        "num_query_groups": 2,
        "untie_embeddings_and_output_weights": True,
    },
    "biases of q, k and v, wide heads, scaled partial rope": {
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "kv_channels": 14,
        "rotary_percent": 0.9,
        "rope_scaling_type": "llama3",
        "rope_original_max_position": 32,  # one frequency is kept, one is interpolated
        "activation": "swiglu",
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "num_query_groups": 2,
    },
    "one group, biases, qk norm": {
        "position_embedding_type": "rope",
        "rotary_base": 500.0,
        "num_query_groups": 1,
        "qk_layernorm": True,
        "activation": "swiglu",
    },
    "two groups, RMS qk norm, learned positions": {
        "normalization": "RMSNorm",
        "num_query_groups": 2,
        "qk_layernorm": True,
        "add_bias_linear": False,
    },
}
STREAM = stream(seed=1, step=3, samples=(7, 8))


def tiny_model(mesh: Mesh, config: ModelConfig = TINY, recompute: str = "none") -> GPT:
    """A float32 GPT with random weights, biases and norms: zeros and ones would hide mistakes."""
    model = build_model(
        Config(
            model=config,
            data=DataConfig(vocab_size=VOCAB),
            train=TrainConfig(precision="fp32"),
            parallel=ParallelConfig(recompute_granularity=recompute),  # type: ignore[arg-type]
        ),
        mesh,
    )
    for number, (name, shard) in enumerate(local_shards(model).items()):
        if name.endswith("bias") or "norm" in name:
            generator = torch.Generator().manual_seed(number)
            noise = torch.randn(shard.global_shape, generator=generator)
            shard.tensor.add_(0.3 * noise[shard.slices])
    return model


def clip(model: GPT, largest_norm: float, mesh: Mesh) -> float:
    """Clip gradients as a training step does; return their norm."""
    gradients = local_gradients(model)
    (square,) = sum_on_host(mesh, squared_norm(gradients, mesh).view(1), ())
    clip_gradients(gradients, square**0.5, largest_norm)
    return square**0.5


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and targets `[2, 12]`, the second row padded."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB, (2, 12), generator=generator)
    targets = torch.randint(VOCAB, (2, 12), generator=generator)
    positions = torch.arange(12).repeat(2, 1)
    targets[1, 8:], positions[1, 8:] = -100, 0
    return tokens, positions, targets


def dense_weights(model: GPT) -> dict[str, Tensor]:
    return {
        name: weight.double().requires_grad_()
        for name, weight in full_tensors(local_shards(model), model.mesh).items()
    }


def dropout_mask(
    shape: tuple[int, ...], layer: int, site: int, masks: DropoutStream = STREAM
) -> Tensor:
    b, s, h = shape
    assert masks.keys is not None
    keep = keep_mask(torch.Size((s, b, h)), 0, 0.1, masks.keys[site_index(layer, site)])
    return keep.transpose(0, 1).double() / 0.9


@distributed(*EVERY_LAYOUT, *OVERLAPPED)
@pytest.mark.parametrize("several_documents", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradients_equal_the_reference(
    mesh: Mesh, options: str, several_documents: bool
) -> None:
    """Within 2e-5 in float32, with dropout, padding, an uneven vocabulary and random biases."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    dense = dense_weights(model)
    tokens, positions, targets = batch()
    documents = key_blocks = None
    if several_documents:
        documents = [[0, 5, 11], [0, 1, 8, 9, 10, 11]]
        numbers = document_numbers(documents, 12)
        positions = torch.arange(12) - torch.searchsorted(numbers, numbers)
        key_blocks = make_key_blocks(12, documents)

    losses = model(tokens, positions, targets, STREAM, key_blocks, z_loss_coeff=0.1)
    # Every dp rank has the same batch here, and gradients sum.
    (losses.objective / mesh.dp.size).backward()
    sum_partial_gradients(local_gradients(model), mesh)

    expected = reference_losses(dense, config, tokens, positions, targets, dropout_mask, documents)
    (expected[0] + 0.1 * expected[1]).backward()
    for loss, dense_loss in zip(losses[1:3], expected, strict=True):
        assert_close(loss.double(), dense_loss, rtol=1e-6, atol=0)
    gradients = full_tensors(gradient_shards(model), mesh)
    assert gradients.keys() == dense.keys()
    for name, gradient in gradients.items():
        scale = dense[name].grad.abs().max().item()
        assert_close(gradient.double(), dense[name].grad, rtol=0, atol=2e-5 * scale, msg=name)

    norm = torch.stack([w.grad.norm() for w in dense.values()]).norm().item()
    assert clip(model, 0.5 * norm, mesh) == pytest.approx(norm, rel=1e-5)
    for name, clipped in full_tensors(gradient_shards(model), mesh).items():
        scale = dense[name].grad.abs().max().item()
        assert_close(clipped.double(), 0.5 * dense[name].grad, rtol=0, atol=2e-5 * scale, msg=name)


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
@pytest.mark.parametrize("largest", [1e-30, 3e19, 2e38])
def test_gradients_of_any_size_have_a_norm(mesh: Mesh, largest: float) -> None:
    """The norm is right even if the squares, or the norm itself, overflow float32."""
    model = tiny_model(mesh)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()  # with dp > 1, with the same placement
    shards = gradient_shards(model)
    dense = {
        name: (largest * seeded(number, *shard.global_shape).clamp(-1, 1)).float().double()
        for number, (name, shard) in enumerate(shards.items())
    }
    fill(shards, dense)
    assert are_finite([shard.tensor for shard in shards.values()])

    norm = torch.stack([gradient.norm() for gradient in dense.values()]).norm().item()
    assert clip(model, 0.5, mesh) == pytest.approx(norm, rel=1e-6)
    scale = min(1.0, 0.5 / (norm + 1e-6))
    for name, clipped in full_tensors(shards, mesh).items():
        # A factor near 1e-41 is subnormal and has few bits.
        assert_close(clipped.double(), scale * dense[name], rtol=1e-3, atol=0)

    shards["norm.weight"].tensor.view(-1)[0] = float("inf")
    assert not are_finite([shard.tensor for shard in shards.values()])


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, dp=2), *OVERLAPPED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(mesh: Mesh, options: str, recompute: str) -> None:
    """Every gradient is bit-identical, with dropout."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    plain, recomputed = tiny_model(mesh, config), tiny_model(mesh, config, recompute=recompute)
    for model in (plain, recomputed):
        model(*batch(), STREAM).objective.backward()
        sum_partial_gradients(local_gradients(model), mesh)
    of_recomputed = gradient_shards(recomputed)
    for name, gradient in gradient_shards(plain).items():
        assert torch.equal(gradient.tensor, of_recomputed[name].tensor), name


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=4), Layout(tp=2, sp=False))
def test_logits_equal_the_reference(mesh: Mesh) -> None:
    """Without targets the model returns the logits of the whole vocabulary."""
    model = tiny_model(mesh)
    tokens, positions, _ = batch()
    with torch.no_grad():
        logits = model(tokens, positions)
        expected = reference_logits(dense_weights(model), TINY, tokens, positions)
    assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@distributed(ONE_RANK, Layout(tp=2))
def test_padding_never_reaches_the_loss(mesh: Mesh) -> None:
    """Changing padding tokens changes no bit of the loss or of any gradient."""
    gradients = []
    for filler in (0, 11):
        model = tiny_model(mesh)
        tokens, positions, targets = batch()
        tokens[1, 8:] = filler
        model(tokens, positions, targets, STREAM).objective.backward()
        gradients.append(clone_tensors(gradient_shards(model)))
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=4))
def test_attention_dropout_is_repeatable(mesh: Mesh) -> None:
    """Masks are equal when recomputed and different at another step."""
    config = dataclasses.replace(TINY, attention_dropout=0.2, hidden_dropout=0.0)
    plain, recomputed = tiny_model(mesh, config), tiny_model(mesh, config, recompute="full")
    for model in (plain, recomputed):
        model(*batch(), STREAM).objective.backward()
        sum_partial_gradients(local_gradients(model), mesh)
    of_recomputed = gradient_shards(recomputed)
    for name, gradient in gradient_shards(plain).items():
        assert torch.equal(gradient.tensor, of_recomputed[name].tensor), name
    other = plain(*batch(), dataclasses.replace(STREAM, step=4)).cross_entropy
    assert not torch.equal(plain(*batch(), STREAM).cross_entropy, other)


@distributed(Layout(tp=2), Layout(tp=2, sp=False))
def test_attention_dropout_differs_between_ranks(mesh: Mesh) -> None:
    """Ranks hold different heads, so their masks must differ."""
    attention = (
        tiny_model(mesh, dataclasses.replace(TINY, attention_dropout=0.2)).blocks[0].attention
    )
    assert attention.seed_attention_dropout(STREAM) == 0.2
    drawn = torch.rand(64, dtype=torch.float64)
    of_both = sum_over(mesh.tp, drawn.clone())
    assert (of_both != 2 * drawn).all()


@distributed(*EVERY_LAYOUT)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_parameter_is_declared_and_trained(mesh: Mesh, options: str) -> None:
    """Parameters hold exactly the weights of `model_weights`, and each has a gradient."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    model(*batch(), STREAM).objective.backward()
    shards = local_shards(model)
    num_local = sum(
        (p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()
    )
    assert num_local == sum(shard.tensor.numel() for shard in shards.values())
    assert all(parameter.grad is not None for parameter in model.parameters())
    shapes = {name: shard.global_shape for name, shard in shards.items()}
    assert shapes == {name: spec.shape for name, spec in model_weights(config, VOCAB).items()}
    assert sum(map(math.prod, shapes.values())) == num_parameters(config, VOCAB)


class _CountMatmuls(TorchDispatchMode):
    """Counts matmuls; attention is one fused operation."""

    num_matmuls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        self.num_matmuls += func._opname in ("mm", "addmm", "matmul", "linear")
        return func(*args, **(kwargs or {}))


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, sp=False), Layout(tp=2, overlap="backward"))
@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_has_four_matmuls(mesh: Mesh, options: str) -> None:
    """A layer has four forward matmuls: q and kv share one parameter, up and gate another."""
    model = tiny_model(mesh, dataclasses.replace(TINY, **OPTIONS[options]))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    matrices = [p for p in model.blocks[0].parameters() if p.ndim == 2]
    assert len(matrices) == 4
    shards, qkv = local_shards(model), model.blocks[0].attention.qkv.weight
    q, kv = (shards[f"blocks.0.attention.qkv.{name}.weight"].tensor for name in ("q", "kv"))
    assert torch.equal(torch.cat([q, kv]), qkv)
    assert q.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    x = torch.randn(12 // (mesh.tp.size if mesh.sequence_parallel else 1), 2, 16)
    positions = torch.arange(12).unsqueeze(1).expand(12, 2)
    context = make_attention_context(model.config, positions, None, STREAM, x.dtype)
    with _CountMatmuls() as count:
        model.blocks[0](x, context)
    assert count.num_matmuls == 4


def bf16_model(mesh: Mesh, config: ModelConfig) -> GPT:
    return build_model(
        Config(
            model=config, data=DataConfig(vocab_size=VOCAB), train=TrainConfig(precision="bf16")
        ),
        mesh,
    )


@distributed(ONE_RANK)
@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_equals_fsdp_casts(mesh: Mesh, options: str) -> None:
    """Layers that cast float32 weights give the loss and gradients of FSDP2's casts.

    Gradients of two micro-batches are summed in float32; those of tables are rounded less often.
    """
    config = dataclasses.replace(TINY, **OPTIONS[options])
    plain, rounded, wrapped = (bf16_model(mesh, config) for _ in range(3))
    for shard in local_shards(rounded).values():
        shard.tensor.copy_(shard.tensor.bfloat16())
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for module in (*wrapped.blocks, wrapped):
        fully_shard(module, mesh=mesh.device_mesh["dp"], mp_policy=policy)
    once = {}
    for number in (1, 2):
        set_gradient_sync(wrapped, number == 2, is_last=number == 2)
        losses = [model(*batch(), STREAM).objective for model in (plain, rounded, wrapped)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])
        for loss in losses:
            loss.backward()
        once = once or clone_tensors(gradient_shards(plain))
    of_wrapped = gradient_shards(wrapped)
    for name, shard in gradient_shards(plain).items():
        assert shard.tensor.dtype == torch.float32
        assert torch.equal(shard.tensor, 2 * once[name]), name
        expected = of_wrapped[name].tensor
        if name in ("embedding.weight", "positions"):
            scale = expected.abs().max().item()
            assert_close(shard.tensor, expected, rtol=2**-7, atol=2**-7 * scale, msg=name)
        else:
            assert torch.equal(shard.tensor, expected), name


def test_flops_equal_a_count_by_hand() -> None:
    """gpt-debug-like shape: 2 layers, h 16, f 64, s 12, v 23."""
    matrices = 2 * (16 * 16 * 4 + 2 * 16 * 64) + 23 * 16
    attention = 2 * 2 * 2 * 12 * 16  # layers x (q k^T and p v) x 2 operations x s x h
    assert flops_per_token(TINY, VOCAB) == 3 * (2 * matrices + attention)
    wide = dataclasses.replace(TINY, kv_channels=10, num_query_groups=2)  # 4 heads: 40 channels
    matrices = 2 * (2 * 16 * 40 + 16 * 2 * 2 * 10 + 2 * 16 * 64) + 23 * 16
    assert flops_per_token(wide, VOCAB) == 3 * (2 * matrices + attention * 40 / 16)
