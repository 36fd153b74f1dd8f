"""What attention needs besides activations, the same in all blocks, and rotary positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.generation.cache import KeyValueCache
from ops.balance import RowDocuments
from parallel import DropoutStream, KeyBlocks

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles, each [s/c, b, 1, d/2]


@dataclass(frozen=True)
class AttentionContext:
    """Of one micro-batch. The same on all tp ranks, because attention sees all their positions."""

    rotation: Rotation | None  # None: learned positions
    mask: Tensor | None  # [b, 1, s, s], true where a query (row) may see a key; None: causal
    stream: DropoutStream | None  # None: no dropout
    cache: KeyValueCache | None = None  # None: no earlier positions
    key_blocks: KeyBlocks | None = None  # of context parallelism, which then replace the mask


def make_attention_context(
    config: ModelConfig,
    positions: Tensor,
    documents: Tensor | RowDocuments | None,
    stream: DropoutStream | None,
    dtype: torch.dtype,
    cache: KeyValueCache | None = None,
    key_blocks: KeyBlocks | None = None,
) -> AttentionContext:
    """Build the context from `positions` (in the document) and `documents` (numbers), `[s, b]`."""
    rotation = None
    if config.position_embedding_type == "rope":
        rotation = rotary_cos_sin(positions, config.head_dim, config.rotary_base, dtype)
    mask = document_mask(documents) if isinstance(documents, Tensor) else None
    return AttentionContext(rotation, mask, stream, cache, key_blocks)


def document_mask(documents: Tensor) -> Tensor:
    """Let a token see itself and earlier tokens of its document; `[s, b]` to `[b, 1, s, s]`."""
    of_token = documents.t().contiguous()  # [b, s]
    same = of_token.unsqueeze(2) == of_token.unsqueeze(1)  # [b, s, s]
    return same.tril_().unsqueeze(1)


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
