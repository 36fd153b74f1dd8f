"""The oracle: a dense GPT in plain torch, one process, no parallel code.

Written from the equations. It takes its weights by the names of ours, so that loss and every
gradient can be compared name by name; dropout masks come as a function, since a mask is a fact
about the run.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import ModelConfig

Mask = Callable[[tuple[int, ...], int, int], Tensor]  # (shape, layer, site) -> scaled keep mask


def reference_loss(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    targets: Tensor,
    mask: Mask | None = None,
) -> Tensor:
    """Sum of the losses of targets >= 0; `[b, s]` inputs, `[b, s, h]` inside."""
    logits = reference_logits(weights, config, tokens, positions, mask)
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def reference_logits(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    mask: Mask | None = None,
) -> Tensor:
    """Logits `[b, s, v]`."""

    def drop(x: Tensor, layer: int, site: int) -> Tensor:
        return x if mask is None else x * mask(tuple(x.shape), layer, site)

    table = weights["embedding.weight"]
    x = drop(table[tokens] + weights["positions"][positions], -1, 0)
    for layer in range(config.num_layers):
        w = {
            name.removeprefix(f"blocks.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        y = _norm(x, w["attention_norm.weight"], w["attention_norm.bias"], config)
        x = x + drop(_attention(y, w, config), layer, 1)
        y = _norm(x, w["mlp_norm.weight"], w["mlp_norm.bias"], config)
        x = x + drop(_mlp(y, w, config), layer, 2)
    x = _norm(x, weights["norm.weight"], weights["norm.bias"], config)
    return x @ weights.get("lm_head", table).T


def _norm(x: Tensor, weight: Tensor, bias: Tensor, config: ModelConfig) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + config.norm_epsilon).sqrt() * weight + bias


def _attention(x: Tensor, w: dict[str, Tensor], config: ModelConfig) -> Tensor:
    b, s, h = x.shape
    a, d = config.num_attention_heads, config.head_dim
    q = (x @ w["attention.qkv.q.weight"].T + w["attention.qkv.q.bias"]).view(b, s, a, d)
    kv = (x @ w["attention.qkv.kv.weight"].T + w["attention.qkv.kv.bias"]).view(b, s, a, 2, d)
    scores = torch.einsum("bqad,bkad->baqk", q, kv[..., 0, :]) / d**0.5
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
    y = torch.einsum("baqk,bkad->bqad", probabilities, kv[..., 1, :]).reshape(b, s, h)
    return y @ w["attention.proj.weight"].T + w["attention.proj.bias"]


def _mlp(x: Tensor, w: dict[str, Tensor], config: ModelConfig) -> Tensor:
    y = x @ w["mlp.expand.up.weight"].T + w["mlp.expand.up.bias"]
    if config.activation == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)
        y = 0.5 * y * (1 + inner.tanh())
    else:
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    return y @ w["mlp.down.weight"].T + w["mlp.down.bias"]
