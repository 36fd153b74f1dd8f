"""A GPT and its training loop in one file of plain PyTorch, as one would write them without us.

The architecture of nanoGPT: learned positions, pre-norm blocks, one projection for q, k and v,
attention by scaled_dot_product_attention, exact GELU, a tied head, autocast to bf16 over float32
weights, fused AdamW, clipping. Two ranks use DistributedDataParallel. `--variant compile` passes
the model through torch.compile. This is the baseline that anybody can check by reading it.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.activations import saved_per_layer
from bench.timing import leave, report, time_steps
from bench.workload import (
    BETAS,
    CLIP_GRAD,
    EPS,
    LR,
    SEED,
    WEIGHT_DECAY,
    Arguments,
    Workload,
    batches,
    join,
    parse,
)


class Attention(nn.Module):
    """Causal self-attention, `[b, s, h]` to `[b, s, h]`."""

    def __init__(self, shape: Workload) -> None:
        super().__init__()
        h = shape.hidden_size
        self.num_heads, self.dropout = shape.num_attention_heads, shape.attention_dropout
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and project."""
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [b, s, 3, a, d]
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [b, a, s, d]
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what it read."""

    def __init__(self, shape: Workload) -> None:
        super().__init__()
        h = shape.hidden_size
        self.attention_norm, self.attention = nn.LayerNorm(h), Attention(shape)
        self.mlp_norm = nn.LayerNorm(h)
        self.up = nn.Linear(h, shape.ffn_hidden_size)
        self.down = nn.Linear(shape.ffn_hidden_size, h)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, s, h]` to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))


class PlainGPT(nn.Module):
    """The model; its forward returns the mean loss of `[b, s]` targets."""

    def __init__(self, shape: Workload) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.positions = nn.Embedding(shape.seq_length, shape.hidden_size)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                to_residual = name.endswith(("proj.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * shape.num_layers) if to_residual else 0.02
                nn.init.normal_(parameter, std=std)  # Radford et al. 2019, section 2.3
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Logits are of the tied head, over all positions at once."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)  # [b, s, v]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(
    model: nn.Module, shape: Workload, step_batches: Callable[[int], list[Tensor]]
) -> Callable[[int], float]:
    """The training loop's body: forward, backward, clip, update; returns the mean loss."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)
    pieces = shape.num_micro_batches

    def step(number: int) -> float:
        total = 0.0
        for index, rows in enumerate(step_batches(number), start=1):
            context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if isinstance(model, DistributedDataParallel) and index < pieces:
                context = model.no_sync()  # ranks average their gradients in the last backward
            with context:
                loss = autocast_loss(model, rows, shape) / pieces
                loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def autocast_loss(model: nn.Module, rows: Tensor, shape: Workload) -> Tensor:
    """The mean loss of rows `[b, s + 1]`, with matrices in the workload's precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=shape.precision == "bf16"):
        return model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def run(arguments: Arguments, rank: int) -> dict[str, Any]:
    """Measure what `arguments.measure` names."""
    shape = arguments.workload
    if arguments.measure == "activations":
        rows = batches(shape, rank)(0)[0]

        def make(num_layers: int) -> tuple[nn.Module, Callable[[], Tensor]]:
            model = PlainGPT(dataclasses.replace(shape, num_layers=num_layers))
            return model, lambda: autocast_loss(model, rows, shape)

        return saved_per_layer(make, shape)
    plain = PlainGPT(shape)
    num_parameters = sum(parameter.numel() for parameter in plain.parameters())
    model: nn.Module = plain
    if arguments.variant == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    if shape.dp > 1:
        model = DistributedDataParallel(model)
    return {
        "num_parameters": num_parameters,
        "flops_per_token": shape.flops_per_token(),
        "tokens_per_step": shape.tokens_per_step,
        **time_steps(make_step(model, shape, batches(shape, rank)), arguments),
    }


def main() -> int:
    """One side of the benchmark."""
    arguments = parse()
    if arguments.workload.tp > 1:
        sys.stderr.write("the plain loop has no tensor parallelism\n")
        return 2
    rank = join(arguments.workload)
    torch.manual_seed(SEED)
    report(run(arguments, rank))
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
