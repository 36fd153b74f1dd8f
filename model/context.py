"""What attention needs besides activations, the same in all blocks, and rotary positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.generation.cache import KeyValueCache
from ops.segments import KeyBlocks, make_key_blocks
from parallel import DropoutStream

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles, each [s/c, b, 1, d/2]


@dataclass(frozen=True)
class AttentionContext:
    """Of one micro-batch. The same on all tp ranks, because attention sees all their positions."""

    rotation: Rotation | None  # None: learned positions
    key_blocks: KeyBlocks  # the keys that queries see; with a cache, they see all earlier ones
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

    Without `key_blocks`, rows are not split over cp, and tokens see all earlier ones.
    """
    if key_blocks is None:
        key_blocks = make_key_blocks(len(positions))
    rotation = None
    if config.position_embedding_type == "rope":
        rotation = rotary_cos_sin(positions, config.head_dim, config.rotary_base, dtype)
    return AttentionContext(rotation, key_blocks, stream, cache)


def rotary_cos_sin(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Rotation:
    """Angles of rotary position embedding (Su et al. 2021): pair i turns by p / base^(2i/d) at p.

    `positions` `[s/c, b]`, not split over tp, as heads have all positions of a cp rank.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None, None] * base ** (-pairs / head_dim)  # [s, b, 1, d/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads `[s, b, a/t, d]` of each position by its angles.

    Channel i is paired with channel i + d/2, as in Hugging Face models (the paper pairs neighbours;
    the two differ by a permutation of the rows of q and k).
    """
    first, second = x.chunk(2, dim=-1)  # each [s, b, a/t, d/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
