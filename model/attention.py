"""Causal self-attention with its heads sharded over the tensor-parallel axis."""

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig, Recompute
from configs.weights import Weights, select
from model.context import AttentionContext, apply_rotary
from model.norm import make_head_norm
from ops.compile import maybe_compile
from ops.recompute import is_same_memory, recompute_in_backward
from ops.sdpa import sdpa
from parallel import (
    DropoutStream,
    MergedColumnParallelLinear,
    Mesh,
    RowParallelLinear,
    context_parallel_attention,
)


class SelfAttention(nn.Module):
    """y = proj(softmax(q k^T / sqrt(d)) v) for each head; `[s/t, b, h]` in and out.

    Each of g groups of a/g heads shares a key and a value (Ainslie et al. 2023). The weights q and
    kv share one gather and one matmul. The rows of kv are ordered by group, so a tp shard is one
    contiguous slice. With g < t, every rank holds kv in full and computes the group it needs. With
    context parallelism, s stands for this rank's s/c positions.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, layer: int, mesh: Mesh, recompute: Recompute
    ) -> None:
        super().__init__()
        self.layer, self.mesh, self.recompute = layer, mesh, recompute
        self.dropout = config.attention_dropout
        self.head_dim, self.qk_layernorm = config.head_dim, config.qk_layernorm
        self.apply_rotary = maybe_compile(apply_rotary, mesh.compile)
        self.qkv = MergedColumnParallelLinear(select(weights, "qkv"), mesh)  # [ad, h], [2gd, h]
        if config.qk_layernorm:
            self.q_norm = make_head_norm(config, select(weights, "q_norm"), mesh)
            self.k_norm = make_head_norm(config, select(weights, "k_norm"), mesh)
        self.proj = RowParallelLinear(select(weights, "proj"), mesh)  # [h, ad]

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        d = self.head_dim
        q, kv = self.qkv(x)  # [s, b, ad/t], [s, b, 2gd/t]
        s, b, _ = q.shape
        q = q.view(s, b, -1, d)  # [s, b, a/t, d]
        k, v = kv.view(s, b, -1, 2, d).unbind(dim=3)  # each [s, b, g/t, d], parts of one tensor
        if self.qk_layernorm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rotation is not None:
            q, k = self.apply_rotary(q, *context.rotation), self.apply_rotary(k, *context.rotation)
            if not self.qk_layernorm:
                v = v.contiguous()  # a view would keep the unrotated q and k until backward
        if context.cache is not None:
            y = context.cache.update_and_attend(self.layer, q, k, v)  # [s, b, a/t, d]
        elif self.mesh.cp.size > 1:
            y = context_parallel_attention(q, k, v, context.key_blocks, self.mesh)
        else:
            dropout = self.seed_attention_dropout(context.stream)
            y = sdpa(q, k, v, context.key_blocks[0].segments, dropout)  # [s, b, a/t, d]
        joined = y.flatten(2)  # [s, b, ad/t], a copy if the kernel had another layout
        kept, is_copy = y.detach(), not is_same_memory(joined, y)
        # Full recomputation keeps neither of them, so there the closure would only keep y alive.
        with recompute_in_backward(
            joined, lambda: kept.flatten(2), when=is_copy and self.recompute != "full"
        ):
            return self.proj(joined)  # [s/t, b, h]

    def seed_attention_dropout(self, stream: DropoutStream | None) -> float:
        """Seed the default generator for SDPA's mask, its only use; return the dropout rate."""
        if stream is None or self.dropout == 0.0:
            return 0.0
        torch.manual_seed(stream.attention_seed(self.layer, self.mesh.tp.rank))
        return self.dropout
