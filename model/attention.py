"""Causal self-attention, heads split over the tensor-parallel axis."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import ModelConfig
from model.initialisation import residual_init
from parallel import ColumnParallelLinear, DropoutStream, Mesh, Normal, RowParallelLinear


class SelfAttention(nn.Module):
    """y = proj(softmax(q k^T / sqrt(d)) v) for each head; `[s/t, b, h]` in and out.

    q and kv are weights of their own that read one gathered input. The rows of kv go head by head:
    the d rows of a head's key, then the d rows of its value, so that a tp shard is one contiguous
    slice.
    """

    def __init__(self, config: ModelConfig, layer: int, mesh: Mesh) -> None:
        super().__init__()
        self.layer, self.mesh = layer, mesh
        self.dropout = config.attention_dropout
        self.head_dim = config.head_dim
        h = config.hidden_size
        self.qkv = ColumnParallelLinear(
            h, {"q": h, "kv": 2 * h}, mesh, Normal(config.init_method_std)
        )
        self.proj = RowParallelLinear(h, h, mesh, residual_init(config))

    def forward(self, x: Tensor, stream: DropoutStream | None) -> Tensor:
        d = self.head_dim
        q, kv = self.qkv(x)  # [s, b, h/t], [s, b, 2h/t]
        s, b, _ = q.shape
        q = q.view(s, b, -1, d)  # [s, b, a/t, d]
        k, v = kv.view(s, b, -1, 2, d).unbind(dim=3)  # each [s, b, a/t, d]
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (q, k, v))  # [b, a/t, s, d]
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop(stream), is_causal=True)
        y = y.permute(2, 0, 1, 3).reshape(s, b, -1)  # [s, b, h/t]
        return self.proj(y)  # [s/t, b, h]

    def drop(self, stream: DropoutStream | None) -> float:
        """The dropout rate, having seeded the generator that SDPA will draw from.

        Nothing else in the project draws from the default generator, so seeding it disturbs nobody,
        and recomputation seeds it alike.
        """
        if stream is None or self.dropout == 0.0:
            return 0.0
        torch.manual_seed(stream.attention_seed(self.layer, self.mesh.tp.rank))
        return self.dropout
