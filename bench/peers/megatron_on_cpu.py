"""What megatron-core 0.16.1 takes from CUDA, given to it from a processor; nothing of it is edited.

It asks torch for the current CUDA device where it needs the name of one, makes small tensors on
"cuda", keeps CUDA's random state, and requires that its parameters say they are of type
`torch.cuda...`. With sequence parallelism it refuses torch's LayerNorm, because somebody must mark
the norm's weights for the sum of their gradients over ranks: `MarkedLayerNorm` does.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patch() -> None:
    """Redirects torch's functions, before megatron is imported."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    for name in ("tensor", "zeros", "ones", "empty"):
        setattr(torch, name, functools.partial(_on_cpu, getattr(torch, name)))
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.Tensor.type = functools.partialmethod(_cuda_type, torch.Tensor.type)  # type: ignore[assignment, method-assign]
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _on_cpu(make: Any, *arguments: Any, **named: Any) -> Tensor:
    if named.get("device") == "cuda":
        named["device"] = "cpu"
    return make(*arguments, **named)


def _cuda_type(tensor: Tensor, real: Any, *arguments: Any, **named: Any) -> Any:
    result = real(tensor, *arguments, **named)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


class MarkedLayerNorm(nn.LayerNorm):
    """torch's LayerNorm, in the form that Megatron's layer specifications call."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FusedCoreAttention(nn.Module):
    """Megatron's core attention through torch's fused kernel, as flash-attn or TE on a GPU."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """`[s, b, a, d]` each to `[s, b, a d]`."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, a, s, d]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return y.permute(2, 0, 1, 3).flatten(2)
