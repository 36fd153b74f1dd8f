"""The inputs of attention that all blocks share, and rotary position embedding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.generation.cache import KeyValueCache
from ops.segments import KeyBlocks, make_key_blocks
from parallel import DropoutStream

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles, each [s/c, b, 1, r/2]


@dataclass(frozen=True)
class AttentionContext:
    """What attention reads besides activations; the same on all tp ranks."""

    rotation: Rotation | None  # None: learned positions
    key_blocks: KeyBlocks  # the keys that queries see; ignored with a cache
    stream: DropoutStream | None  # None: no dropout
    cache: KeyValueCache | None = None  # None: no earlier positions


def make_attention_context(
    config: ModelConfig,
    positions: Tensor,
    key_blocks: KeyBlocks | None,
    stream: DropoutStream | None,
    dtype: torch.dtype,
    cache: KeyValueCache | None = None,
) -> AttentionContext:
    """Build the context; `positions` `[s, b]` count from the beginning of their document.

    `key_blocks` None: rows are not split over cp, and a token sees all earlier ones.
    """
    if key_blocks is None:
        key_blocks = make_key_blocks(len(positions))
    rotation = None
    if config.position_embedding_type == "rope":
        rotation = rotary_cos_sin(positions, config, dtype)
    return AttentionContext(rotation, key_blocks, stream, cache)


def rotary_cos_sin(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotation:
    """Cosines and sines of p / base^(2i/r) for pair i at each of `positions` (Su et al. 2021)."""
    r = config.rotary_dim
    pairs = torch.arange(0, r, 2, dtype=torch.float32, device=positions.device)
    frequencies = config.rotary_base ** (-pairs / r)
    if config.rope_scaling_type == "llama3":
        frequencies = scale_frequencies(frequencies, config)
    angles = positions[..., None, None] * frequencies  # [s, b, 1, r/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def scale_frequencies(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Divide low frequencies for a longer context, as Llama 3.1 (Grattafiori et al. 2024) does.

    A frequency with at most `rope_low_freq_factor` turns in the original context is divided by
    `rope_scaling_factor`, one with at least `rope_high_freq_factor` is kept; those in between are
    interpolated linearly in the number of turns.
    """
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / config.rope_scaling_factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r channels of the heads `[s, b, a/t, d]` by the angles of their positions.

    Channel i is paired with channel i + r/2, as in Hugging Face models (the paper pairs neighbours;
    the two differ by a permutation of the rows of q and k).
    """
    first, second, *others = x.split(cos.shape[-1], dim=-1)  # each [s, b, a/t, r/2]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*rotated, *others), dim=-1)
