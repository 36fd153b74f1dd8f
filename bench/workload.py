"""The workload of every side: model shape, layout, batches and optimizer settings.

"bench-gpt" is the default: GPT-2's architecture, 8 layers of 512 channels, 34.1 million parameters,
4,096 tokens per step. It is small enough for two cores, and a third of a step is matrix products,
as in larger models. Imports only torch, because the peers' environments have nothing of ours.
"""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

LAYOUTS = ("tp1", "tp2", "tp2+sp", "dp2")
PIPELINE = "pp2"  # a layout of ours alone
_LAYOUT = re.compile(r"(tp|cp|pp|dp)\d(\+sp|\+(tp|cp|pp|dp)\d)*")
LR, BETAS, EPS, WEIGHT_DECAY, CLIP_GRAD = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SEED = 1234
_BATCHES = 4  # different ones, taken in turn
_BATCH_SEED = 77


@dataclass(frozen=True)
class Workload:
    """One training set-up; sizes as in configs/schema.py."""

    layout: str = "tp1"  # sizes of axes, such as tp2+sp+dp2
    precision: str = "bf16"  # bf16, with float32 master weights, or fp32
    dropout: float = 0.0  # after the embedding, the attention projection and the MLP
    attention_dropout: float = 0.0  # on attention probabilities
    num_layers: int = 8
    hidden_size: int = 512
    num_attention_heads: int = 8
    seq_length: int = 1024
    vocab_size: int = 16384
    global_batch_size: int = 4  # sequences
    micro_batch_size: int = 0  # sequences; 0: all that a rank has in a step
    text: str = ""  # file whose bytes are the tokens; "": random tokens

    def size(self, axis: str) -> int:
        """Number of ranks on an axis."""
        found = re.search(rf"{axis}(\d)", self.layout)
        return int(found[1]) if found else 1

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return math.prod(map(self.size, ("tp", "cp", "pp", "dp")))

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.size("tp")

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.size("dp")

    @property
    def sequence_parallel(self) -> bool:
        """Whether norms and dropout are split over the sequence."""
        return "sp" in self.layout

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward and backward of one rank."""
        return self.micro_batch_size or self.global_batch_size // self.dp

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes of a step, on one rank."""
        return self.global_batch_size // self.dp // self.micro_batch

    @property
    def ffn_hidden_size(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.hidden_size

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of a step, over all ranks."""
        return self.global_batch_size * self.seq_length

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def flops_per_token(self, weights_per_layer: int | None = None) -> int:
        """As configs/weights.py; `weights_per_layer`: in matrices, if it is not a GPT-2 layer."""
        h = self.hidden_size
        layer = 4 * h * h + 2 * h * self.ffn_hidden_size
        matrices = self.num_layers * (weights_per_layer or layer) + self.vocab_size * h
        return 6 * matrices + 12 * self.num_layers * h * self.seq_length

    def flags(self) -> list[str]:
        """Return the command line that `parse` reads back."""
        return [f"--{name}={value}" for name, value in dataclasses.asdict(self).items()]


@dataclass(frozen=True)
class Arguments:
    """A side's command line."""

    workload: Workload
    variant: str  # of the side; each says which it has
    measure: str  # "speed" or "activations"
    warmup: int
    steps: int
    patience_s: float
    overrides: tuple[str, ...]  # section.key=value, for ours


def parse(arguments: list[str] | None = None) -> Arguments:
    """Reads the command line of a side, and sets the threads and the seed it asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in dataclasses.fields(Workload):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--variant", default="")
    parser.add_argument("--measure", choices=("speed", "activations"), default="speed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock counts")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed")
    parser.add_argument("--patience_s", type=float, default=30, help="wait so long for other jobs")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for ours")
    given = vars(parser.parse_args(arguments))
    shape = {field.name: given.pop(field.name) for field in dataclasses.fields(Workload)}
    workload = Workload(**shape)
    if not _LAYOUT.fullmatch(workload.layout):
        parser.error(f"--layout={workload.layout} is not a layout such as tp2+sp+dp2")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if workload.num_ranks != started:
        parser.error(f"--layout={workload.layout} takes {workload.num_ranks} ranks, not {started}")
    given["overrides"] = tuple(given["overrides"])
    return Arguments(workload, **given)


def join(workload: Workload) -> int:
    """Joins the other ranks over gloo if there are any; returns this one's number."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workload.num_ranks))
    torch.manual_seed(SEED)
    if workload.num_ranks > 1:
        dist.init_process_group("gloo")
        return dist.get_rank()
    return 0


def batches(workload: Workload, rank: int) -> Callable[[int], list[Tensor]]:
    """The micro-batches of a step by its number, each `[b, s + 1]`: inputs and, shifted, targets.

    The global batch is the same on every layout; dp ranks have their part, tp ranks the same one.
    """
    size, s = workload.global_batch_size, workload.seq_length
    if workload.text:
        tokens = torch.tensor(list(Path(workload.text).read_bytes()))
    else:
        generator = torch.Generator().manual_seed(_BATCH_SEED)
        length = _BATCHES * size * s + 1
        tokens = torch.randint(0, workload.vocab_size, (length,), generator=generator)
    rows = tokens[: (len(tokens) - 1) // s * s + 1].unfold(0, s + 1, s)  # [n, s + 1]
    own = size // workload.dp
    first = rank // workload.tp * own

    def step(number: int) -> list[Tensor]:
        places = (number * size + first + torch.arange(own)) % len(rows)
        return list(rows[places].split(workload.micro_batch))

    return step
