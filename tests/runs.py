"""Whole runs of train.py for tests: in the pool of workers, and through the command line."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from configs import Config, parse_config
from parallel import Mesh
from tests.distributed import Layout, run_on
from tests.lines import ROOT
from train import train
from training.run_folder import RunFolder
from training.signals import StopSignals

# Forty steps on two ranks: long enough to interrupt in the middle.
LONG = ("train.train_steps=40", "checkpoint.save_interval=5", "evaluate.interval=0")


def settings(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    """A small run in float32 with dropout, an uneven vocabulary and an odd sequence length."""
    arguments = [
        "config=gpt_debug.yaml",
        "run.name=test",
        f"run.directory={directory}",
        "data.source=text",
        f"data.path={corpus}",
        f"data.cache_directory={corpus.parent / 'cache'}",
        "data.vocab_size=331",
        "data.validation_fraction=0.1",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.seq_length=37",
        "model.ffn_hidden_size=128",
        "model.hidden_dropout=0.1",
        "train.precision=fp32",
        "train.train_steps=6",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "optimizer.lr=1e-2",
        "optimizer.min_lr=1e-3",
        "optimizer.lr_warmup_steps=2",
        "evaluate.interval=3",
        "evaluate.sample_tokens=4",
        "checkpoint.save_interval=0",
        "logging.wandb=disabled",
        *overrides,
    ]
    return [f"{key}={value}" for key, value in dict(a.split("=", 1) for a in arguments).items()]


def rows(directory: Path, name: str = "test") -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without speed and memory."""
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.startswith(("speed", "mem"))
        }
        for line in lines
    ]


def run_in_pool(mesh: Mesh, config: Config) -> None:
    """Train on one rank of the pool."""
    with RunFolder(config, mesh) as folder:
        assert train(config, mesh, folder, StopSignals()) == 0


def train_on(layout: Layout, arguments: list[str]) -> None:
    """Run a configuration on a layout."""
    config = parse_config(arguments)
    parallel = dataclasses.replace(
        config.parallel, tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sp
    )
    run_on(layout, run_in_pool, config=dataclasses.replace(config, parallel=parallel))


def command(ranks: int, arguments: list[str], flags: Sequence[str] = ()) -> list[str]:
    """The command that a user would type; ranks are tensor-parallel unless the arguments differ.

    `flags` are torchrun's; a single rank is started by torchrun only if there are any.
    """
    tp = "parallel.tensor_model_parallel_size"
    layout = [] if any(argument.startswith(tp) for argument in arguments) else [f"{tp}={ranks}"]
    program = [str(ROOT / "train.py"), *layout, *arguments]
    if ranks == 1 and not flags:
        return [sys.executable, *program]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, *flags, *program]


def start(
    ranks: int,
    arguments: list[str],
    flags: Sequence[str] = (),
    *,
    largest_file_kib: int | None = None,
    terminal: int = subprocess.PIPE,
) -> "subprocess.Popen[str]":
    """Start a run, away from the repository and in a process group of its own.

    `largest_file_kib`: the system refuses to write a larger file, as a full disk would.
    `terminal`: the file descriptor that the run prints to, in place of a pipe.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    limited: list[str] = []
    if largest_file_kib is not None:
        limited = ["bash", "-c", 'ulimit -f "$0"; exec "$@"', str(largest_file_kib)]
    return subprocess.Popen(
        [*limited, *command(ranks, arguments, flags)],
        stdout=terminal,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", expected: int = 0) -> str:
    """Wait for the end; return the output."""
    output, _ = process.communicate(timeout=100)
    assert process.returncode == expected, output
    return output


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Poll until a condition of the run folder holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(directory: Path) -> int:
    """The number of lines in metrics.jsonl."""
    path = directory / "test" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers_of(directory: Path) -> Iterator[int]:
    """Process ids of the ranks of a run."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if f"run.directory={directory}" in line and "torch.distributed.run" not in line:
                yield int(entry.name)


def ranks_of(directory: Path) -> dict[int, int]:
    """The process id of each rank of a run under torchrun."""
    ranks = {}
    for worker in workers_of(directory):
        try:
            environment = Path(f"/proc/{worker}/environ").read_text().split("\0")
        except OSError:
            continue
        ranks |= {int(e.removeprefix("RANK=")): worker for e in environment if e[:5] == "RANK="}
    return ranks
