"""GPT: embedding, blocks, head.

Legend (Korthikanti et al. 2022, table 1, with g, d and f added): `s` sequence length, `b`
micro-batch size, `h` hidden size, `a` attention heads, `g` groups of them that share a key and a
value, `d = h/a` head dimension, `f` feed-forward size, `v` vocabulary, `t` tensor-parallel size,
`L` layers. Sequence first: `[s, b, h]`, so that a sequence shard is a contiguous piece of dim 0.
`[s/t, ...]` is with sequence parallelism; without it, `[s, ...]`.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from configs.schema import ModelConfig, Recompute
from model.attention import SelfAttention
from model.context import AttentionContext, make_attention_context
from model.generation.cache import KeyValueCache
from model.initialisation import matrix_init
from model.mlp import MLP
from model.norm import make_norm
from ops.recompute import (
    recompute_in_backward,
)
from parallel import (
    DropoutStream,
    Losses,
    Mesh,
    VocabParallelEmbedding,
    declare_parameter,
    dropout_add,
    gather_vocabulary,
    lookup,
    sequence_shard,
    vocab_parallel_logits,
    vocab_parallel_loss,
)

# Sites of hidden dropout inside a layer; with the layer's number they name a mask.
AFTER_EMBEDDING, AFTER_ATTENTION, AFTER_MLP = range(3)


class Block(nn.Module):
    """x + dropout(attention(norm(x))), then the same with the MLP; `[s/t, b, h]` in and out."""

    def __init__(self, config: ModelConfig, layer: int, mesh: Mesh, recompute: Recompute) -> None:
        super().__init__()
        self.mesh, self.layer, self.recompute = mesh, layer, recompute
        self.hidden_dropout = config.hidden_dropout
        self.attention_norm = make_norm(config, mesh)
        self.attention = SelfAttention(config, layer, mesh, recompute)
        self.mlp_norm = make_norm(config, mesh)
        self.mlp = MLP(config, mesh, recompute)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        if self.recompute == "full":
            # Only x is kept. Masks are functions of their names, so there is no state to restore.
            return checkpoint(
                self.residuals, x, context, use_reentrant=False, preserve_rng_state=False
            )
        return self.residuals(x, context)

    def residuals(self, x: Tensor, context: AttentionContext) -> Tensor:
        """The two residual equations of the block."""
        y = self.attention_norm(x)
        with self.recompute_in_backward(y, self.attention_norm, x):
            y = self.attention(y, context)
        x = self.dropout_add(y, x, context.stream, AFTER_ATTENTION)
        y = self.mlp_norm(x)
        with self.recompute_in_backward(y, self.mlp_norm, x):
            y = self.mlp(y)
        return self.dropout_add(y, x, context.stream, AFTER_MLP)

    def recompute_in_backward(
        self, y: Tensor, norm: nn.Module, x: Tensor
    ) -> AbstractContextManager[None]:
        """Inside, `y = norm(x)` is not kept for backward if recomputation is selective."""
        kept = x.detach()
        return recompute_in_backward(y, lambda: norm(kept), when=self.recompute == "selective")

    def dropout_add(self, y: Tensor, x: Tensor, stream: DropoutStream | None, site: int) -> Tensor:
        """`x + dropout(y)`."""
        return dropout_add(y, x, self.hidden_dropout, stream, self.layer, site, self.mesh)


class GPT(nn.Module):
    """A decoder-only transformer: pre-norm, learned or rotary positions, a tied or separate head.

    tokens -> embedding (+ position), dropout -> L blocks -> norm -> logits.
    """

    positions: DTensor  # [s, h], where they are learned
    lm_head: DTensor  # [v, h], where it is not tied

    def __init__(
        self, config: ModelConfig, vocab_size: int, mesh: Mesh, recompute: Recompute = "none"
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.mesh = config, vocab_size, mesh
        self.has_learned_positions = config.position_embedding_type == "learned_absolute"
        init = matrix_init(config)
        self.embedding = VocabParallelEmbedding(vocab_size, config.hidden_size, mesh, init)
        if self.has_learned_positions:
            # Looked up on the sequence shard, after the reduce-scatter of the embedding.
            declare_parameter(
                self,
                "positions",
                (config.seq_length, config.hidden_size),
                mesh,
                init=init,
                grad_is_partial=mesh.sequence_parallel,
            )
        self.blocks = nn.ModuleList(
            Block(config, layer, mesh, recompute) for layer in range(config.num_layers)
        )
        self.norm = make_norm(config, mesh)
        if config.untie_embeddings_and_output_weights:
            declare_parameter(
                self, "lm_head", (vocab_size, config.hidden_size), mesh, init=init, tp_dim=0
            )

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor | None = None,
        stream: DropoutStream | None = None,
        documents: Tensor | None = None,
        z_loss_coeff: float = 0.0,
        cache: KeyValueCache | None = None,
        logits_to_keep: slice = slice(None),
    ) -> Losses | Tensor:
        """The losses of all targets; without targets the logits, `[b, s, v]` float32.

        `tokens`, `positions`, `targets` `[b, s]`; s a multiple of t. Targets below 0 don't count.
        Without a `stream` there is no dropout.
        With `documents` `[b, s]`, tokens see only those that have the same number.
        With a `cache`, tokens follow those that it holds, and see them; no backward.
        `logits_to_keep`: the positions whose logits are, where not all.
        """
        # The only transpose: data is batch first, the model sequence first.
        positions, documents = positions.t(), None if documents is None else documents.t()
        x = self.embed(tokens.t(), positions, stream)  # [s/t, b, h]
        context = make_attention_context(self.config, positions, documents, stream, x.dtype, cache)
        for block in self.blocks:
            x = block(x, context)
        x = self.norm(x)
        table = (
            self.lm_head
            if self.config.untie_embeddings_and_output_weights
            else self.embedding.weight
        )
        if targets is None:
            # [s, b, v/t]
            logits = vocab_parallel_logits(x, table.to_local(), self.mesh, logits_to_keep)
            return gather_vocabulary(logits, self.mesh, self.vocab_size).transpose(0, 1)
        # Inside the root's forward, because FSDP2 frees the head's weight after it.
        return vocab_parallel_loss(
            x, table.to_local(), targets.t(), self.vocab_size, self.mesh, z_loss_coeff
        )

    def embed(self, tokens: Tensor, positions: Tensor, stream: DropoutStream | None) -> Tensor:
        """Token (plus learned position), with dropout; `[s, b]` to `[s/t, b, h]`."""
        x = self.embedding(tokens)  # [s/t, b, h]
        if self.has_learned_positions:
            x = x + lookup(self.positions.to_local(), sequence_shard(positions, self.mesh))
        # Layer -1: the site before all layers.
        return dropout_add(
            x, None, self.config.hidden_dropout, stream, -1, AFTER_EMBEDDING, self.mesh
        )
