"""Decoding with a KV cache gives the same tokens as without, on every layout."""

import dataclasses
import itertools
import random

import pytest
import torch
from torch import Tensor

from configs.schema import Config, DataConfig, ModelConfig, TrainConfig
from model import Sampling, build_inference_model, generate, generate_tokens
from model.generation.cache import KeyValueCache
from model.generation.sampling import filtered_probs, sample_tokens, uniform_draw
from parallel import Mesh, local_shards
from tests.distributed import ONE_RANK, Layout, distributed
from tests.model.test_gpt import OPTIONS, TINY, VOCAB, dense_weights, tiny_model
from tests.reference import reference_logits

GREEDY = Sampling(temperature=0.0)
NUM_TOKENS = 14  # beyond the context length of 12
NUM_IDS = VOCAB - 2


def uncached_tokens(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokens: list[int],
    sampling: Sampling,
    sample: int,
) -> list[int]:
    """The next token after each prefix, from the third token on, by the float64 reference.

    It computes the last 12 tokens of each prefix, without a cache.
    """
    parts = [tokens[max(0, end - 12) : end] for end in range(3, len(tokens))]
    rows = torch.tensor([part + [0] * (12 - len(part)) for part in parts])
    logits = reference_logits(weights, config, rows, torch.arange(12).expand(len(rows), -1))
    return [
        int(sample_tokens(row[len(part) - 1, :NUM_IDS].unsqueeze(0), sampling, [place]))
        for row, part, place in zip(
            logits,
            parts,
            (uniform_draw(sampling, sample, n) for n in range(len(parts))),
            strict=True,
        )
    ]


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, sp=False), Layout(tp=4), Layout(tp=2, dp=2))
@pytest.mark.parametrize("options", OPTIONS)
def test_cached_tokens_equal_uncached(mesh: Mesh, options: str) -> None:
    """Greedy and sampled, three samples at once, beyond the context length; spare rows unused."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    weights = {name: weight.detach() for name, weight in dense_weights(model).items()}
    for sampling in (GREEDY, Sampling(0.7, top_k=7, top_p=0.9, seed=5)):
        decoded = generate_tokens(
            model, [1, 2, 3], NUM_TOKENS, sampling, num_ids=NUM_IDS, num_samples=3
        )
        for sample, tokens in enumerate(zip(*decoded, strict=True)):
            expected = uncached_tokens(weights, config, [1, 2, 3, *tokens], sampling, sample)
            assert list(tokens) == expected, (sampling, sample)


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=4, sp=False))
@pytest.mark.parametrize("options", OPTIONS)
def test_cached_logits_equal_uncached(mesh: Mesh, options: str) -> None:
    """Decoding 4 positions at a time gives the same logits up to rounding."""
    model = tiny_model(mesh, dataclasses.replace(TINY, **OPTIONS[options]))
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(12).repeat(2, 1)
    cache = KeyValueCache(capacity=12, batch=2)
    with torch.no_grad():
        expected = model(tokens, positions)
        pieces = []
        for start, end in itertools.pairwise((0, 4, 8, 12)):
            piece = slice(start, end)
            pieces.append(model(tokens[:, piece], positions[:, piece], cache=cache))
            cache.length = end
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-5)


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, dp=2))
def test_samples_are_reproducible(mesh: Mesh) -> None:
    """A sample depends on its seed and its number, not on how many samples there are."""
    model = tiny_model(mesh)

    def sampled(seed: int, num_samples: int) -> list[tuple[int, ...]]:
        decoded = generate_tokens(
            model, [1], 8, Sampling(seed=seed), num_ids=VOCAB, num_samples=num_samples
        )
        return list(zip(*decoded, strict=True))

    three = sampled(5, 3)
    assert len(set(three)) == 3
    assert sampled(5, 1) == three[:1]
    assert sampled(6, 3) != three


@distributed(ONE_RANK, Layout(tp=2))
def test_generation_ends_after_the_end_id(mesh: Mesh) -> None:
    """The result includes the prompt."""
    model = tiny_model(mesh)
    whole = generate(model, [1, 2, 3], 8, GREEDY, num_ids=VOCAB)
    assert whole[:3] == [1, 2, 3]
    assert len(whole) == 11
    first = whole.index(whole[6], 3)
    ended = generate(model, [1, 2, 3], 8, GREEDY, num_ids=VOCAB, end_id=whole[6])
    assert ended == whole[: first + 1]


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=4))
@pytest.mark.parametrize("options", ["gpt2", "llama"])
def test_cache_size(mesh: Mesh, options: str) -> None:
    """The cache holds float32 keys and values of all positions, for this rank's groups only."""
    config = dataclasses.replace(TINY, **OPTIONS[options])
    model = tiny_model(mesh, config)
    cache = KeyValueCache(capacity=12, batch=3)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        model(tokens, torch.arange(4).unsqueeze(0), cache=cache)
    groups = max(1, config.num_groups // mesh.tp.size)
    assert cache.num_bytes == 4 * 2 * config.num_layers * 12 * 3 * groups * config.head_dim


@distributed(Layout(tp=2), Layout(tp=2, dp=2))
def test_an_inference_model_holds_only_its_shard(mesh: Mesh) -> None:
    """Weights have the compute dtype and no gradients; load_tensors fills them."""
    trained = tiny_model(mesh)
    config = Config(model=TINY, data=DataConfig(vocab_size=VOCAB), train=TrainConfig())
    bare = build_inference_model(config, mesh)
    of_trained = local_shards(trained)
    for name, shard in local_shards(bare).items():
        assert shard.global_shape == of_trained.pop(name).global_shape, name
    assert not of_trained
    for parameter in bare.parameters():
        assert (parameter.dtype, parameter.requires_grad) == (torch.bfloat16, False)
        assert parameter.untyped_storage().nbytes() == 2 * parameter.numel()


def naive_probs(row: list[float], sampling: Sampling) -> list[float]:
    """Apply the definitions token by token, most likely token first."""
    weights = [2.718281828459045 ** (logit / sampling.temperature) for logit in row]
    order = sorted(range(len(row)), key=lambda token: (-weights[token], token))
    kept = order[: sampling.top_k]
    total, so_far, chosen = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if sampling.top_p is not None and so_far >= sampling.top_p * total:
            break
        chosen.append(token)
        so_far += weights[token]
    return [weights[token] / so_far if token in chosen else 0.0 for token in range(len(row))]


@pytest.mark.parametrize("top_k", [None, 1, 3, 8, 50])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.77, 1.0])
def test_filtered_probs_follow_the_definitions(top_k: int | None, top_p: float | None) -> None:
    """Top-k, top-p and temperature, also with equal logits."""
    rng = random.Random(3)
    rows = [[rng.gauss(0, 2) for _ in range(8)] for _ in range(5)]
    rows.append([1.0, 2.0, 2.0, 2.0, 0.0, 0.0, -1.0, 2.0])
    sampling = Sampling(0.8, top_k, top_p)
    found = filtered_probs(torch.tensor(rows, dtype=torch.float64), sampling)
    found /= found.sum(dim=-1, keepdim=True)
    expected = torch.tensor([naive_probs(row, sampling) for row in rows])
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)


def test_token_frequencies_equal_their_probabilities() -> None:
    """With evenly spaced draws in [0, 1), frequencies equal probabilities."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    sampling = Sampling(top_k=3)
    draws = [number / 4000 for number in range(4000)]
    chosen = sample_tokens(logits.expand(4000, -1), sampling, draws)
    expected = naive_probs(logits[0].tolist(), sampling)
    counts = chosen.bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor(expected), rtol=0, atol=1e-3)
    assert counts[1] == 0


def test_draws_are_uniform() -> None:
    """Over samples and positions."""
    draws = [
        uniform_draw(Sampling(seed=7), sample, number)
        for sample in range(40)
        for number in range(50)
    ]
    assert len(set(draws)) == 2000
    assert all(0 <= value < 1 for value in draws)
    counts = torch.histc(torch.tensor(draws), bins=10, min=0, max=1)
    assert (counts - 200).abs().max() < 60  # four standard deviations
