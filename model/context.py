"""What all blocks need to know of a micro-batch besides its activations, worked out once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.generation.cache import KeyValueCache
from model.rotary import Rotation, rotary_cos_sin
from parallel import DropoutStream


@dataclass(frozen=True)
class AttentionContext:
    """Of one micro-batch; the same on all tp ranks, since attention sees all positions."""

    rotation: Rotation | None  # None: positions are learned
    mask: Tensor | None  # [b, 1, s, s], true where a query (row) may see a key; None: all before it
    stream: DropoutStream | None  # None: no dropout
    cache: KeyValueCache | None = None  # None: what is read now is all there is


def make_attention_context(
    config: ModelConfig,
    positions: Tensor,
    documents: Tensor | None,
    stream: DropoutStream | None,
    dtype: torch.dtype,
    cache: KeyValueCache | None = None,
) -> AttentionContext:
    """`positions` and `documents` `[s, b]`: places in the document, and which document it is."""
    rotation = None
    if config.position_embedding_type == "rope":
        rotation = rotary_cos_sin(positions, config.head_dim, config.rotary_base, dtype)
    mask = None if documents is None else document_mask(documents)
    return AttentionContext(rotation, mask, stream, cache)


def document_mask(documents: Tensor) -> Tensor:
    """A token sees itself and what is before it in its document; `[s, b]` to `[b, 1, s, s]`."""
    of_token = documents.t().contiguous()  # [b, s]
    same = of_token.unsqueeze(2) == of_token.unsqueeze(1)  # [b, s, s]
    return same.tril_().unsqueeze(1)
