"""The sides of the comparison, the environments of the peers, and the visits of a run.

A visit is one launch of one side on one workload. `make bench` makes all visits of a round before
the next round, so that a machine that slows down does so for every side.
"""

import itertools
import os
import sys
import typing
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.workload import LAYOUTS, Workload
from configs import ParallelConfig

PEERS = Path(os.environ.get("PEERS", "~/.cache/peers")).expanduser() / "v"
# What pip installs beside torch, which is pinned to ours. megatron-core is the newest for Python
# 3.11; torchtitan imports triton without asking for it.
ENVIRONMENTS = {
    "megatron": ("megatron-core==0.16.1", "numpy"),
    "titan": ("torchtitan==0.3.0", "numpy", "triton"),
    "hf": ("transformers==5.24.0", "accelerate", "numpy"),
    "litgpt": ("litgpt==0.5.13", "numpy"),
}


@dataclass(frozen=True)
class Side:
    """A trainer in one of its forms."""

    key: str  # for --only, and in results
    name: str  # in tables
    module: str
    environment: str | None = None  # one of ENVIRONMENTS; None: ours
    variant: str = ""
    layouts: tuple[str, ...] = LAYOUTS

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        if self.environment is None:
            return Path(sys.executable)
        return PEERS / self.environment / "bin" / "python"


OURS = Side("ours", "ours", "bench.ours")
PLAIN = Side("plain", "plain PyTorch", "bench.plain_gpt", layouts=("tp1", "dp2"))
MEGATRON = Side(
    "megatron", "megatron-core 0.16.1, SDPA", "bench.peers.megatron", "megatron", "sdpa"
)
GEMM = Side("gemm", "matrix products alone", "bench.limits", layouts=("tp1", "tp2"))
OVERHEAD = Side("overhead", "batches and logging", "bench.overhead", layouts=("tp1",))
SIDES = (
    OURS,
    PLAIN,
    replace(PLAIN, key="compiled", name="plain PyTorch, torch.compile", variant="compile"),
    MEGATRON,
    Side("megatron-own", "megatron-core 0.16.1", "bench.peers.megatron", "megatron"),
    Side("titan", "torchtitan 0.3.0 (Llama)", "bench.peers.titan", "titan"),
    Side(
        "transformers",
        "transformers 5.24.0",
        "bench.peers.transformers_gpt2",
        "hf",
        layouts=("tp1", "dp2"),
    ),
    Side("litgpt", "litgpt 0.5.13", "bench.peers.litgpt_pythia", "litgpt", layouts=("tp1",)),
)
GRANULARITIES: tuple[str, ...] = typing.get_args(
    typing.get_type_hints(ParallelConfig)["recompute_granularity"]
)
_SCALING_TOKENS = 8192  # a step


@dataclass(frozen=True)
class Visit:
    """One launch of one side."""

    kind: str  # which table it belongs to
    side: Side
    workload: Workload
    overrides: tuple[str, ...] = ()  # section.key=value, of ours
    measure: str = "speed"

    @property
    def words(self) -> set[str]:
        """What `--only` picks it by."""
        shape = self.workload
        if self.kind == "gemm":  # measures both precisions, for all layouts of as many ranks
            alike = {layout for layout in LAYOUTS if Workload(layout).num_ranks == shape.num_ranks}
            return {"gemm", "speed", "bf16", "fp32", *alike}
        return {self.kind, self.side.key, shape.layout, shape.precision, *self.overrides}

    @property
    def command(self) -> list[str]:
        """What is run, from the root, without the steps to do."""
        num_ranks = str(self.workload.num_ranks)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
        return [
            str(self.side.python),
            *(launcher if self.workload.num_ranks > 1 else []),
            "-m",
            self.side.module,
            *self.workload.flags(),
            f"--variant={self.side.variant}",
            f"--measure={self.measure}",
            *self.overrides,
        ]

    @property
    def record(self) -> dict[str, Any]:
        """What tells its results from others'."""
        return {
            "kind": self.kind,
            "side": self.side.key,
            "workload": asdict(self.workload),
            "overrides": list(self.overrides),
        }


def all_visits() -> Iterator[Visit]:
    """A round of everything but scaling; what is compared is close together."""
    for layout in GEMM.layouts:
        yield Visit("gemm", GEMM, Workload(layout))
    yield Visit("overhead", OVERHEAD, Workload())
    for precision, layout in itertools.product(("bf16", "fp32"), LAYOUTS):
        for side in SIDES:
            if layout in side.layouts:
                yield Visit("speed", side, Workload(layout, precision))
    for layout in ("tp1", "tp2+sp"):
        yield from _dropout_visits(layout)
        yield from _activation_visits(layout)


def _dropout_visits(layout: str) -> Iterator[Visit]:
    """Ours, and who else drops on this layout; without dropout it is in the speed table."""
    other = PLAIN if layout in PLAIN.layouts else MEGATRON
    for attention_dropout, side in itertools.product((0.0, 0.1), (OURS, other)):
        shape = Workload(layout, dropout=0.1, attention_dropout=attention_dropout)
        yield Visit("dropout", side, shape)


def _activation_visits(layout: str) -> Iterator[Visit]:
    """What is kept for backward, and the speed of keeping less."""
    shape = Workload(layout, dropout=0.1)
    yield Visit("activations", MEGATRON, shape, measure="activations")
    for granularity in GRANULARITIES:
        override = (f"parallel.recompute_granularity={granularity}",)
        yield Visit("activations", OURS, shape, override, "activations")
        # Without dropout, so that it stands beside `none` of the speed table.
        if granularity != "none":
            yield Visit("recompute", OURS, Workload(layout), override)


def scaling_visits() -> Iterator[Visit]:
    """A round of ours and the plain loop over sequence length, micro-batch and model size."""
    for shape in scaling_shapes():
        for side in (OURS, PLAIN):
            yield Visit("scaling", side, shape)


def scaling_shapes() -> Iterator[Workload]:
    """Each once, though some belong to two series; heads are of 64 channels throughout."""
    shapes = [
        Workload(seq_length=length, global_batch_size=_SCALING_TOKENS // length)
        for length in (512, 1024, 2048, 4096, 8192)
    ]
    shapes += [
        Workload(seq_length=512, global_batch_size=16, micro_batch_size=size)
        for size in (1, 2, 4, 8)  # and 16, which is the first of all
    ]
    shapes += [
        Workload(num_layers=layers, hidden_size=h, num_attention_heads=h // 64)
        for h in (256, 512, 1024)
        for layers in (2, 8, 16)
    ]
    yield from dict.fromkeys(shapes)
