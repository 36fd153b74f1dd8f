"""Causal self-attention, heads split over the tensor-parallel axis."""

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig, Recompute
from model.context import AttentionContext
from model.initialisation import matrix_init, residual_init
from model.norm import make_head_norm
from model.rotary import rotate
from ops.compile import (
    maybe_compile,
)
from ops.recompute import (
    is_same_memory,
    recompute_in_backward,
)
from ops.sdpa import sdpa
from parallel import (
    DropoutStream,
    MergedColumnParallelLinear,
    Mesh,
    RowParallelLinear,
)


class SelfAttention(nn.Module):
    """y = proj(softmax(q k^T / sqrt(d)) v) for each head; `[s/t, b, h]` in and out.

    g groups of a/g heads share a key and a value (Ainslie et al. 2023); g = a: each has its own. q
    and kv are weights of their own that read one gathered input. The rows of kv go group by group:
    the d rows of a group's key, then the d rows of its value, so that a tp shard is one contiguous
    slice. With g < t groups every rank keeps kv in full and computes the one group it needs.
    """

    def __init__(self, config: ModelConfig, layer: int, mesh: Mesh, recompute: Recompute) -> None:
        super().__init__()
        self.layer, self.mesh, self.recompute = layer, mesh, recompute
        self.dropout = config.attention_dropout
        self.head_dim, self.qk_layernorm = config.head_dim, config.qk_layernorm
        self.rotate = maybe_compile(rotate, mesh.compiles)
        h, g = config.hidden_size, config.num_groups
        self.qkv = MergedColumnParallelLinear(
            h,
            {"q": h, "kv": 2 * g * config.head_dim},
            mesh,
            matrix_init(config),
            has_bias=config.add_bias_linear,
            num_row_groups={"kv": g},
        )
        if config.qk_layernorm:
            self.q_norm = make_head_norm(config, mesh)
            self.k_norm = make_head_norm(config, mesh)
        self.proj = RowParallelLinear(
            h, h, mesh, residual_init(config), has_bias=config.add_bias_linear
        )

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        d = self.head_dim
        q, kv = self.qkv(x)  # [s, b, h/t], [s, b, 2gd/t]
        s, b, _ = q.shape
        q = q.view(s, b, -1, d)  # [s, b, a/t, d]
        k, v = kv.view(s, b, -1, 2, d).unbind(dim=3)  # each [s, b, g/t, d]
        if self.qk_layernorm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = self.rotate(q, *context.rotation), self.rotate(k, *context.rotation)
        if context.cache is None:
            y = sdpa(
                q, k, v, context.mask, self.seed_attention_dropout(context.stream)
            )  # [s, b, a/t, d]
        else:
            y = context.cache.update_and_attend(self.layer, q, k, v)  # [s, b, a/t, d]
        joined = y.flatten(2)  # [s, b, h/t], a copy if the kernel had another layout
        kept, is_copy = y.detach(), not is_same_memory(joined, y)
        # Full recomputation keeps neither; the recipe would.
        with recompute_in_backward(
            joined, lambda: kept.flatten(2), when=is_copy and self.recompute != "full"
        ):
            return self.proj(joined)  # [s/t, b, h]

    def seed_attention_dropout(self, stream: DropoutStream | None) -> float:
        """The dropout rate, having seeded the generator that SDPA will draw from.

        Nothing else in the project draws from the default generator, so seeding it disturbs nobody,
        and recomputation seeds it alike.
        """
        if stream is None or self.dropout == 0.0:
            return 0.0
        torch.manual_seed(stream.attention_seed(self.layer, self.mesh.tp.rank))
        return self.dropout
