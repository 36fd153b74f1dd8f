"""GPT: embedding, blocks, head.

Legend (Korthikanti et al. 2022, table 1, with g, d, r and f added): `s` sequence length, `b`
micro-batch size, `h` hidden size, `a` attention heads, `g` groups of them that share a key and a
value, `d` channels of a head (h/a by default), `r` of them that RoPE rotates (d by default), `f`
feed-forward size, `v` vocabulary, `t` tensor-parallel size, `L` layers. Sequence first: `[s, b,
h]`, so that a sequence shard is a contiguous piece of dim 0. `[s/t, ...]` is with sequence
parallelism; without it, read `[s, ...]`. With context parallelism each rank has s/c positions
(ops/balance.py), and s stands for those.
"""

from contextlib import AbstractContextManager
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.layout import stage_layers
from configs.schema import ModelConfig, Recompute
from configs.weights import block_weights, model_weights, select
from model.attention import SelfAttention
from model.context import AttentionContext, make_attention_context
from model.generation.cache import KeyValueCache
from model.mlp import MLP
from model.norm import make_norm
from ops.recompute import recompute_in_backward
from ops.segments import KeyBlocks, make_key_blocks
from parallel import (
    DropoutStream,
    Losses,
    Mesh,
    VocabParallelEmbedding,
    declare_parameter,
    dropout_add,
    forward_only,
    gather_vocabulary,
    lookup,
    prepare_masks,
    sequence_shard,
    vocab_parallel_logits,
    vocab_parallel_loss,
)

# Where hidden dropout is applied; a mask is a function of layer and site, among others.
AFTER_EMBEDDING, AFTER_ATTENTION, AFTER_MLP = range(3)


class Block(nn.Module):
    """x + dropout(attention(norm(x))), then the same with the MLP; `[s/t, b, h]` in and out."""

    def __init__(self, config: ModelConfig, layer: int, mesh: Mesh, recompute: Recompute) -> None:
        super().__init__()
        self.mesh, self.layer, self.recompute = mesh, layer, recompute
        self.hidden_dropout = config.hidden_dropout
        weights = block_weights(config)
        self.attention_norm = make_norm(config, select(weights, "attention_norm"), mesh)
        self.attention = SelfAttention(config, select(weights, "attention"), layer, mesh, recompute)
        self.mlp_norm = make_norm(config, select(weights, "mlp_norm"), mesh)
        self.mlp = MLP(config, select(weights, "mlp"), mesh, recompute)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        if self.recompute == "full":
            # Saves only x. Dropout masks are pure functions, so no RNG state is saved.
            return checkpoint(
                self.residuals, x, context, use_reentrant=False, preserve_rng_state=False
            )
        return self.residuals(x, context)

    def residuals(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Apply both halves of the block to the residual stream x."""
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
        """Recompute `y = norm(x)` in backward instead of saving it, if recompute is selective."""
        kept = x.detach()
        return recompute_in_backward(y, lambda: norm(kept), when=self.recompute == "selective")

    def dropout_add(self, y: Tensor, x: Tensor, stream: DropoutStream | None, site: int) -> Tensor:
        """`x + dropout(y)`."""
        return dropout_add(y, x, self.hidden_dropout, stream, self.layer, site, self.mesh)


class ChunkInput(TypedDict, total=False):
    """Which chunk of this pipeline stage to run, and its input (None: embed the tokens)."""

    chunk: int
    x: Tensor | None


class GPT(nn.Module):
    """A decoder-only transformer: pre-norm, learned or rotary positions, a tied or separate head.

    tokens -> embedding (+ position), dropout -> L blocks -> norm -> logits. Activations have
    `dtype`. In a pipeline, a rank has only the modules of its stage.
    """

    positions: Tensor  # [s, h], where they are learned
    lm_head: Tensor  # [v, h], where it is not tied

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        mesh: Mesh,
        recompute: Recompute = "none",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.mesh, self.dtype = config, vocab_size, mesh, dtype
        weights = model_weights(config, vocab_size)
        self.is_tied = "lm_head" not in weights
        if mesh.pp.rank == 0 or (mesh.is_last_stage and self.is_tied):
            is_tied = self.is_tied and mesh.pp.size > 1
            self.embedding = VocabParallelEmbedding(
                weights["embedding.weight"], mesh, dtype, is_tied
            )
        self.has_learned_positions = "positions" in weights
        if mesh.pp.rank == 0 and (table := weights.get("positions")):
            # Looked up on the sequence shard, after the reduce-scatter of the embedding.
            declare_parameter(
                self, "positions", table, mesh, grad_is_partial=mesh.sequence_parallel
            )
        self.blocks, self.chunks = nn.ModuleList(), []
        num_pieces = mesh.pp.size * mesh.num_chunks
        for piece in range(mesh.pp.rank, num_pieces, mesh.pp.size):
            chunk = []
            for layer in stage_layers(config.num_layers, num_pieces, piece):
                chunk.append(Block(config, layer, mesh, recompute))
                # Weights are named by the layer's number in the whole model.
                self.blocks.add_module(str(layer), chunk[-1])
            self.chunks.append(chunk)
        if mesh.is_last_stage:
            self.norm = make_norm(config, select(weights, "norm"), mesh)
            if not self.is_tied:
                declare_parameter(self, "lm_head", weights["lm_head"], mesh)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor | None = None,
        stream: DropoutStream | None = None,
        key_blocks: KeyBlocks | None = None,
        z_loss_coeff: float = 0.0,
        cache: KeyValueCache | None = None,
        logits_to_keep: slice = slice(None),
        **piece: Unpack[ChunkInput],
    ) -> Losses | Tensor:
        """Return the losses over all targets, or without targets the logits `[b, s, v]` in float32.

        Pipeline stages before the last return activations instead.
        `tokens`, `positions`, `targets` `[b, s]`; s a multiple of t. Negative targets are ignored.
        `stream` selects the dropout masks; None: no dropout.
        `key_blocks`: the keys that each token sees; None: all earlier tokens of its row.
        `cache`: keys and values of earlier tokens; no backward.
        `logits_to_keep`: the positions to compute logits for.
        `piece`: run only this chunk of the stage. By default all run, with p > 1 forward only.
        """
        # The only transpose: data is batch first, the model sequence first.
        tokens, positions = tokens.t(), positions.t()
        mesh, shape = self.mesh, self.activation_shape(tokens)
        if key_blocks is None and mesh.cp.size > 1:
            width, cp = len(positions) * mesh.cp.size, mesh.cp
            key_blocks = make_key_blocks(width, None, cp.rank, cp.size)
        if stream is not None:
            stream = prepare_masks(stream, shape, self.config.hidden_dropout, mesh)
        context = make_attention_context(
            self.config, positions, key_blocks, stream, self.dtype, cache
        )

        def run_chunk(chunk: int, x: Tensor | None) -> Losses | Tensor:
            if x is None:
                x = self.embed(tokens, positions, stream)  # [s/t, b, h]
            for block in self.chunks[chunk]:
                x = block(x, context)
            if not mesh.is_last_stage or chunk < mesh.num_chunks - 1:
                return x
            return self.head(x, targets, z_loss_coeff, logits_to_keep)

        if piece:
            return run_chunk(**piece)
        return forward_only(mesh, shape, self.dtype, run_chunk)

    def modules_of_chunk(self, chunk: int) -> list[nn.Module]:
        """The FSDP units whose gradients the last backward of a chunk completes."""
        return [*self.chunks[chunk], *([self] if chunk == 0 else [])]

    def activation_shape(self, tokens: Tensor) -> tuple[int, int, int]:
        """The shape `[s/t, b, h]` of the activations of tokens `[s, b]` on this rank."""
        s, b = tokens.shape
        shards = self.mesh.tp.size if self.mesh.sequence_parallel else 1
        return s // shards, b, self.config.hidden_size

    def head(
        self, x: Tensor, targets: Tensor | None, z_loss_coeff: float, logits_to_keep: slice
    ) -> Losses | Tensor:
        """Return the losses of the last block's output, or without `targets` the logits."""
        x = self.norm(x)
        head = (self.embedding.weight if self.is_tied else self.lm_head).to(x.dtype)  # [v/t, h]
        if targets is None:
            logits = vocab_parallel_logits(x, head, self.mesh, logits_to_keep)  # [s, b, v/t]
            return gather_vocabulary(logits, self.mesh, self.vocab_size).transpose(0, 1)
        # Computed here because FSDP2 frees the weight of the head after the root's forward.
        return vocab_parallel_loss(x, head, targets.t(), self.vocab_size, self.mesh, z_loss_coeff)

    def embed(self, tokens: Tensor, positions: Tensor, stream: DropoutStream | None) -> Tensor:
        """Embed tokens (and learned positions), then dropout; `[s, b]` to `[s/t, b, h]`."""
        x = self.embedding(tokens)  # [s/t, b, h]
        if self.has_learned_positions:
            x = x + lookup(self.positions, sequence_shard(positions, self.mesh), x.dtype)
        dropout, layer = self.config.hidden_dropout, -1  # the site before layer 0
        return dropout_add(x, None, dropout, stream, layer, AFTER_EMBEDDING, self.mesh)
