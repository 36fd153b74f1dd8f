"""Whole runs of train.py for tests: in the pool of workers, and through the command line."""

import atexit
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from configs import Config, parse_config
from data import Corpus
from data.loader import BatchLoader
from data.rows import MicroBatch
from ops.matmul import Choice, Precision
from parallel import Mesh
from tests.distributed import Layout, run_on
from tests.fork_server import REGISTRY, Program
from tests.lines import ROOT
from train import train
from training import hardware
from training.run_folder import RunFolder
from training.signals import StopSignals

# Forty steps of two micro-batches on two ranks: long enough to interrupt in the middle.
LONG = (
    "train.train_steps=40",
    "train.micro_batch_size=4",
    "checkpoint.save_interval=5",
    "evaluate.interval=0",
)


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
        "evaluate.max_sequences=19",
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
            if not key.startswith(("speed", "mem", "time_s"))
        }
        for line in lines
    ]


def global_batch(config: Config, corpus: Corpus) -> MicroBatch:
    """The rows of the first step on all ranks, in one micro-batch."""
    train = dataclasses.replace(config.train, micro_batch_size=config.train.global_batch_size)
    with BatchLoader(
        corpus,
        dataclasses.replace(config, train=train),
        consumed_samples=0,
        first_step=0,
        dp_rank=0,
        dp_size=1,
        tp_size=1,
        device_is_cuda=False,
    ) as batches:
        (whole,) = next(batches).micro_batches
    return whole


def run_in_pool(mesh: Mesh, config: Config, fastest: Choice) -> None:
    """Train on one rank of the pool."""
    with (
        patch.object(hardware, "fastest_precision", lambda _: Precision(fastest, fastest)),
        RunFolder(config, mesh) as folder,
    ):
        assert train(config, mesh, folder, StopSignals()) == 0


def config_on(layout: Layout, arguments: list[str]) -> Config:
    """The configuration of a run on a layout."""
    config = parse_config(arguments)
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        context_parallel_size=layout.cp,
        data_parallel_replicate_size=layout.replicas,
        cp_comm_type=layout.cp_comm_type,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.chunks if layout.chunks > 1 else None,
    )
    return dataclasses.replace(config, parallel=parallel)


def train_on(layout: Layout, arguments: list[str], *, fastest: Choice = "widened") -> None:
    """Run a configuration on a layout, as on a processor with this fastest precision of bf16."""
    run_on(layout, run_in_pool, config=config_on(layout, arguments), fastest=fastest)


def start(
    ranks: int,
    arguments: list[str],
    flags: Sequence[str] = (),
    *,
    largest_file_kib: int | None = None,
) -> Program:
    """Start train.py outside the repository, on tensor-parallel ranks unless the arguments differ.

    `flags` are torchrun's; one rank is started by torchrun only with them. `largest_file_kib`: the
    system refuses to write a larger file, as a full disk would.
    """
    tp = "parallel.tensor_model_parallel_size"
    layout = [] if any(argument.startswith(tp) for argument in arguments) else [f"{tp}={ranks}"]
    under_torchrun = ranks > 1 or flags
    return Program(
        [str(ROOT / "train.py"), *layout, *arguments],
        environment={**os.environ, "OMP_NUM_THREADS": "1", REGISTRY: str(_registry(arguments))},
        torchrun=["--nproc-per-node", str(ranks), *flags] if under_torchrun else None,
        largest_file_kib=largest_file_kib,
    )


def _registry(arguments: list[str]) -> Path:
    """The folder in which the ranks of all runs in one `run.directory` register."""
    (directory,) = [a.partition("=")[2] for a in arguments if a.startswith("run.directory=")]
    registry = _registry_of(Path(directory))
    registry.mkdir(exist_ok=True)
    return registry


def _registry_of(directory: Path) -> Path:
    return _registries() / hashlib.sha256(str(directory).encode()).hexdigest()[:16]


@functools.cache
def _registries() -> Path:
    """A folder of this process: process ids of another session may be those of strangers."""
    folder = tempfile.mkdtemp(prefix="ranks-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def launch(
    ranks: int,
    arguments: list[str],
    flags: Sequence[str] = (),
    *,
    terminal: int = subprocess.PIPE,
) -> "subprocess.Popen[str]":
    """Start train.py as a user does, without the fork server: for what only a shell can show.

    `terminal`: the file descriptor that the run prints to, in place of a pipe.
    """
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *flags]
    layout = f"parallel.tensor_model_parallel_size={ranks}"
    return subprocess.Popen(
        [
            sys.executable,
            *(launcher if ranks > 1 or flags else ()),
            str(ROOT / "train.py"),
            layout,
            *arguments,
        ],
        stdout=terminal,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(
    process: "Program | subprocess.Popen[str]", expected: int = 0, limit_s: float = 300
) -> str:
    """Wait for the end; return the output."""
    output, _ = process.communicate(timeout=limit_s)
    assert process.returncode == expected, output
    return output


def wait_for(condition: Callable[[], bool], process: "Program | subprocess.Popen[str]") -> None:
    """Poll until a condition of the run folder holds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(directory: Path) -> int:
    """The number of lines in metrics.jsonl."""
    path = directory / "test" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def workers_of(directory: Path) -> list[int]:
    """Process ids of the running ranks of a run."""
    return list(ranks_of(directory).values())


def ranks_of(directory: Path) -> dict[int, int]:
    """The process id of each running rank of a run."""
    registered = (path.name.split("-") for path in _registry_of(directory).glob("*-*"))
    return {int(rank): int(pid) for pid, rank in registered if _is_running(pid)}


def _is_running(pid: str) -> bool:
    try:
        return Path("/proc", pid, "cmdline").read_bytes() != b""  # a zombie has none
    except OSError:
        return False
