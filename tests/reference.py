"""The reference: a dense GPT in plain torch, in one process, without parallel code.

Written from the equations. Its weights have the same names as ours, so that every gradient can be
compared by name. Dropout masks are passed in as a function.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.schema import ModelConfig
from ops.segments import Documents

Mask = Callable[[tuple[int, ...], int, int], Tensor]  # (shape, layer, site) -> scaled keep mask


def reference_losses(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    targets: Tensor,
    mask: Mask | None = None,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over targets >= 0 of loss and of log^2 sum exp; `[b, s]` inputs, `[b, s, h]` inside."""
    logits = reference_logits(weights, config, tokens, positions, mask, documents)
    loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return loss, logits.logsumexp(-1)[targets >= 0].square().sum()


def document_numbers(documents: Documents, width: int) -> Tensor:
    """Number the documents of each row; `[b, s]`."""
    columns = torch.arange(width)
    return torch.stack(
        [torch.searchsorted(torch.tensor(begins), columns, right=True) for begins in documents]
    )


def reference_logits(
    weights: dict[str, Tensor],
    config: ModelConfig,
    tokens: Tensor,
    positions: Tensor,
    mask: Mask | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Logits `[b, s, v]`."""
    numbers = document_numbers(documents or [[0]] * len(tokens), tokens.shape[1])

    def drop(x: Tensor, layer: int, site: int) -> Tensor:
        return x if mask is None else x * mask(tuple(x.shape), layer, site)

    table = weights["embedding.weight"]
    x = table[tokens]
    if config.position_embedding_type == "learned_absolute":
        x = x + weights["positions"][positions]
    x = drop(x, -1, 0)
    for layer in range(config.num_layers):
        w = {
            name.removeprefix(f"blocks.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        y = _norm(x, w, "attention_norm", config)
        x = x + drop(_attention(y, w, config, positions, numbers), layer, 1)
        y = _norm(x, w, "mlp_norm", config)
        x = x + drop(_mlp(y, w, config), layer, 2)
    x = _norm(x, weights, "norm", config)
    return x @ weights.get("lm_head", table).T


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _norm(x: Tensor, w: dict[str, Tensor], name: str, config: ModelConfig) -> Tensor:
    if config.normalization == "RMSNorm":
        square = x.square().mean(-1, keepdim=True)
        return x / (square + config.norm_epsilon).sqrt() * w[f"{name}.weight"]
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + config.norm_epsilon).sqrt() * w[f"{name}.weight"] + w[
        f"{name}.bias"
    ]


def _attention(
    x: Tensor, w: dict[str, Tensor], config: ModelConfig, positions: Tensor, numbers: Tensor
) -> Tensor:
    b, s, _ = x.shape
    a, d, g = config.num_attention_heads, config.head_dim, config.num_groups
    q = _linear(x, w, "attention.qkv.q").view(b, s, a, d)
    k, v = _linear(x, w, "attention.qkv.kv").view(b, s, g, 2, d).unbind(3)
    if config.qk_layernorm:
        q, k = _norm(q, w, "attention.q_norm", config), _norm(k, w, "attention.k_norm", config)
    if config.position_embedding_type == "rope":
        q, k = (_apply_rotary(x, positions, config) for x in (q, k))
    mine = torch.arange(a) * g // a  # the group of each head
    scores = torch.einsum("bqad,bkad->baqk", q, k[:, :, mine]) / d**0.5
    hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
    hidden = hidden | (numbers[:, :, None] != numbers[:, None, :])  # [b, s, s]
    probabilities = scores.masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1)
    y = torch.einsum("baqk,bkad->bqad", probabilities, v[:, :, mine]).reshape(b, s, a * d)
    return _linear(y, w, "attention.proj")


def _apply_rotary(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """Rotation as a complex product: channels i and i + r/2 are real and imaginary part."""
    half = int(config.head_dim * config.rotary_percent) // 2
    frequencies = config.rotary_base ** -(torch.arange(half, dtype=torch.float64) / half)
    if config.rope_scaling_type == "llama3":
        frequencies = torch.stack([_scale(frequency, config) for frequency in frequencies])
    angles = positions[..., None].double() * frequencies  # [b, s, r/2]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = torch.complex(first, second) * torch.exp(1j * angles).unsqueeze(2)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def _scale(frequency: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1's rule, case by case, in wavelengths."""
    length, factor = config.rope_original_max_position, config.rope_scaling_factor
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    wavelength = 2 * torch.pi / frequency
    if wavelength < length / high:
        return frequency
    if wavelength > length / low:
        return frequency / factor
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _mlp(x: Tensor, w: dict[str, Tensor], config: ModelConfig) -> Tensor:
    y = _linear(x, w, "mlp.expand.up")
    if config.activation == "swiglu":
        gate = _linear(x, w, "mlp.expand.gate")
        y = y * gate / (1 + torch.exp(-gate))
    elif config.activation == "gelu_tanh":
        inner = (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)
        y = 0.5 * y * (1 + inner.tanh())
    else:
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    return _linear(y, w, "mlp.down")
