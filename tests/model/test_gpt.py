"""The model equals the dense reference on every layout: loss and every gradient."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from configs.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from configs.weights import model_weights
from model import GPT, build_model, flops_per_token, num_parameters
from ops.dropout import keep_mask
from parallel import (
    DropoutStream,
    Mesh,
    are_finite,
    clip_gradients,
    local_part,
    local_slices,
    parameter_facts,
    sum_over,
    sum_partial_gradients,
    tp_shard_dim,
)
from tests.distributed import EVERY_LAYOUT, ONE_RANK, OVERLAPPED, Layout, distributed
from tests.parallel.test_mappings import seeded
from tests.reference import reference_logits, reference_losses

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
STREAM = DropoutStream(seed=1, step=3, sample_indices=(7, 8))


def tiny_model(mesh: Mesh, config: ModelConfig = TINY, recompute: str = "none") -> GPT:
    """A float32 GPT with random biases and norms too, as zeros and ones would hide mistakes."""
    model = build_model(
        Config(
            model=config,
            data=DataConfig(vocab_size=VOCAB),
            train=TrainConfig(precision="fp32"),
            parallel=ParallelConfig(recompute_granularity=recompute),  # type: ignore[arg-type]
        ),
        mesh,
    )
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("bias") or "norm" in name:
                noise = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(number)
                )
                mine = local_slices(parameter.shape, tp_shard_dim(parameter), mesh.tp, mesh.dp)
                parameter.to_local().add_(0.3 * noise[mine])
    return model


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
        name: parameter.full_tensor().detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }


def dropout_mask(
    shape: tuple[int, ...], layer: int, site: int, stream: DropoutStream = STREAM
) -> Tensor:
    b, s, h = shape
    keep = keep_mask(torch.Size((s, b, h)), 0, 0.1, stream.keys(layer, site, torch.device("cpu")))
    return keep.transpose(0, 1).double() / 0.9


@distributed(*EVERY_LAYOUT, *OVERLAPPED)
@pytest.mark.parametrize("several_documents", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradients_equal_the_reference(
    mesh: Mesh, options: str, several_documents: bool
) -> None:
    """With dropout, padding, an uneven vocabulary and random biases; within 2e-5 in float32."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    dense = dense_weights(model)
    tokens, positions, targets = batch()
    documents = None
    if several_documents:
        documents = torch.tensor([[0] * 5 + [1] * 6 + [2], [0, *[1] * 7, 2, 3, 4, 5]])
        starts = torch.searchsorted(documents, documents)  # where each token's document begins
        positions = torch.arange(12) - starts

    losses = model(tokens, positions, targets, STREAM, documents, z_loss_coeff=0.1)
    # Every dp rank has the same batch here, and gradients sum.
    (losses.objective / mesh.dp.size).backward()
    sum_partial_gradients(model, mesh)

    expected = reference_losses(dense, config, tokens, positions, targets, dropout_mask, documents)
    (expected[0] + 0.1 * expected[1]).backward()
    for loss, dense_loss in zip(losses[1:], expected, strict=True):
        assert_close(loss.double(), dense_loss, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.full_tensor().double()
        scale = dense[name].grad.abs().max().item()
        assert_close(gradient, dense[name].grad, rtol=0, atol=2e-5 * scale, msg=name)

    norm = torch.stack([w.grad.norm() for w in dense.values()]).norm()
    assert_close(clip_gradients(model, 0.5 * norm.item(), mesh).double(), norm, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        clipped, scale = parameter.grad.full_tensor().double(), dense[name].grad.abs().max().item()
        assert_close(clipped, 0.5 * dense[name].grad, rtol=0, atol=2e-5 * scale, msg=name)


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
@pytest.mark.parametrize("largest", [1e-30, 3e19, 2e38])
def test_gradients_of_any_size_have_a_norm(mesh: Mesh, largest: float) -> None:
    """Finite elements whose squares, or whose norm, overflow float32."""
    model = tiny_model(mesh)
    dense = []
    for number, parameter in enumerate(model.parameters()):
        gradient = seeded(number, *parameter.shape).clamp(-1, 1)
        parameter.grad = parameter.detach().clone()  # a DTensor of the same placement
        parameter.grad.to_local().copy_(largest * gradient[local_part(parameter, mesh)])
        dense.append((largest * gradient).float().double())
    assert are_finite([parameter.grad.to_local() for parameter in model.parameters()])

    norm = torch.stack([gradient.norm() for gradient in dense]).norm()
    assert_close(clip_gradients(model, 0.5, mesh).double(), norm, rtol=1e-6, atol=0)
    scale = min(1.0, 0.5 / (norm.item() + 1e-6))
    for parameter, gradient in zip(model.parameters(), dense, strict=True):
        # A factor near 1e-41 has few bits left.
        clipped = parameter.grad.full_tensor().double()
        assert_close(clipped, scale * gradient, rtol=1e-3, atol=0)

    parameter.grad.to_local().view(-1)[0] = float("inf")
    assert not are_finite([parameter.grad.to_local() for parameter in model.parameters()])


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, dp=2), *OVERLAPPED)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(mesh: Mesh, options: str, recompute: str) -> None:
    """Every gradient is bit for bit equal, with dropout."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    plain, recomputed = tiny_model(mesh, config), tiny_model(mesh, config, recompute=recompute)
    for model in (plain, recomputed):
        model(*batch(), STREAM).objective.backward()
        sum_partial_gradients(model, mesh)
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad.to_local(), b.grad.to_local()), name


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=4), Layout(tp=2, sp=False))
def test_logits_equal_the_reference(mesh: Mesh) -> None:
    """Without targets the model returns full rows of logits, without dropout."""
    model = tiny_model(mesh)
    tokens, positions, _ = batch()
    with torch.no_grad():
        logits = model(tokens, positions)
        expected = reference_logits(dense_weights(model), TINY, tokens, positions)
    assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


@distributed(ONE_RANK, Layout(tp=2))
def test_padding_never_reaches_the_loss(mesh: Mesh) -> None:
    """Tokens in padded slots change neither the loss nor any gradient, bit for bit."""
    gradients = []
    for filler in (0, 11):
        model = tiny_model(mesh)
        tokens, positions, targets = batch()
        tokens[1, 8:] = filler
        model(tokens, positions, targets, STREAM).objective.backward()
        gradients.append([parameter.grad.to_local() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=4))
def test_attention_dropout_is_repeatable(mesh: Mesh) -> None:
    """Masks follow from the stream: equal when recomputed, different at another step."""
    config = dataclasses.replace(TINY, attention_dropout=0.2, hidden_dropout=0.0)
    plain, recomputed = tiny_model(mesh, config), tiny_model(mesh, config, recompute="full")
    for model in (plain, recomputed):
        model(*batch(), STREAM).objective.backward()
        sum_partial_gradients(model, mesh)
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad.to_local(), b.grad.to_local()), name
    other = plain(*batch(), dataclasses.replace(STREAM, step=4)).cross_entropy
    assert not torch.equal(plain(*batch(), STREAM).cross_entropy, other)


@distributed(Layout(tp=2), Layout(tp=2, sp=False))
def test_attention_dropout_differs_between_ranks(mesh: Mesh) -> None:
    """Heads of different ranks are different heads, so their masks must differ."""
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
    """Parameters are those of `model_weights`, and each has facts and a gradient."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    model(*batch(), STREAM).objective.backward()
    names = [name for name, _ in model.named_parameters()]
    assert set(names) == set(parameter_facts(model))
    assert all(parameter.grad is not None for parameter in model.parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {name: spec.shape for name, spec in model_weights(config, VOCAB).items()}
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config, VOCAB)


def test_flops_equal_a_count_by_hand() -> None:
    """gpt-debug-like shape: 2 layers, h 16, f 64, s 12, v 23."""
    matrices = 2 * (16 * 16 * 4 + 2 * 16 * 64) + 23 * 16
    attention = 2 * 2 * 2 * 12 * 16  # layers x (q k^T and p v) x 2 operations x s x h
    assert flops_per_token(TINY, VOCAB) == 3 * (2 * matrices + attention)
