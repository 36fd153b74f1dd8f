"""A run: the same losses on every layout, and none of them lost.

The layouts are compared inside the pool of workers; what a person does (start, kill, Ctrl-C,
resume) goes through the real command line.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import Config, parse_config
from parallel import Mesh
from run_folder import RunFolder
from stopping import StopSignals
from tests.distributed import ONE_RANK, Layout, run_on
from train import train

REPOSITORY = Path(__file__).parent.parent
WORDS = ["def", "return", "self", "import", "class", "for", "while", "if", "else", "None", "True"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of very different length, and a place for their tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(3 + 11 * number)]
        lines = [" ".join(words[i : i + 6]) for i in range(0, len(words), 6)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + f"\n# {number}\n")
    return folder


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
    """What metrics.jsonl says, without what depends on the clock."""
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
    """train.py's story on one rank of the pool."""
    with RunFolder(config, mesh) as folder:
        assert train(config, mesh, folder, StopSignals()) == 0


def train_on(layout: Layout, arguments: list[str]) -> None:
    """Run a configuration on a layout."""
    config = parse_config(arguments)
    parallel = dataclasses.replace(
        config.parallel, tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sp
    )
    run_on(layout, run_in_pool, config=dataclasses.replace(config, parallel=parallel))


@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_every_layout_gives_the_same_losses(corpus: Path, tmp_path: Path, mode: str) -> None:
    """Float32, dropout, rows and vocabulary that no layout divides: within 2e-6 over six steps."""
    layouts = {
        ONE_RANK: 4,
        Layout(tp=2): 8,
        Layout(tp=2, sp=False): 2,
        Layout(tp=4): 1,
        Layout(dp=2): 4,
        Layout(tp=2, dp=2): 2,
        Layout(dp=4): 1,
    }
    curves = {}
    for layout, micro_batch_size in layouts.items():
        directory = tmp_path / str(layout)
        overrides = (f"data.sequence_mode={mode}", f"train.micro_batch_size={micro_batch_size}")
        train_on(layout, settings(corpus, directory, *overrides))
        curves[layout] = rows(directory)
    reference = curves.pop(ONE_RANK)
    assert [row["step"] for row in reference] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert reference[-2]["train/loss"] < 0.95 * reference[0]["train/loss"]
    for layout, curve in curves.items():
        for row, expected in zip(curve, reference, strict=True):
            assert row.keys() == expected.keys()
            # A gradient norm is a sum of squares of differences: an order looser.
            for key, value in row.items():
                tolerance = 2e-5 if key == "train/grad_norm" else 2e-6
                assert value == pytest.approx(expected[key], rel=tolerance), (
                    layout,
                    row["step"],
                    key,
                )


@pytest.mark.parametrize("gradient_sync", ["step", "micro_batch"])
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(dp=2)], ids=str)
def test_micro_batches_and_recompute_change_nothing(
    corpus: Path, tmp_path: Path, gradient_sync: str, layout: Layout
) -> None:
    """How a global batch is split, synchronised or recomputed is a matter of memory alone."""
    curves = []
    for number, (micro_batch_size, recompute) in enumerate([(4, "none"), (2, "full"), (1, "none")]):
        directory = tmp_path / str(number)
        overrides = (
            f"train.micro_batch_size={micro_batch_size}",
            f"parallel.recompute_granularity={recompute}",
            f"parallel.gradient_sync={gradient_sync}",
        )
        train_on(layout, settings(corpus, directory, *overrides))
        curves.append([row["train/loss"] for row in rows(directory) if "train/loss" in row])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(tp=2), Layout(tp=2)),
        (Layout(tp=2), ONE_RANK),
        (ONE_RANK, Layout(tp=2, dp=2)),
        (Layout(tp=2, dp=2), Layout(tp=4)),
        (Layout(dp=4), Layout(tp=2, sp=False)),
    ],
    ids=str,
)
def test_resume_continues_the_curve(
    corpus: Path, tmp_path: Path, before: Layout, after: Layout
) -> None:
    """Stopped at step 3 and resumed: bit for bit on the same layout, to 1e-5 on another."""
    for layout, name in ((before, "whole"), (before, "parts")):
        stop = ("run.stop_at_step=3",) if name == "parts" else ()
        train_on(layout, settings(corpus, tmp_path, f"run.name={name}", *stop))
    assert [row["step"] for row in rows(tmp_path, "parts")] == [1, 2, 3, 3]
    train_on(after, settings(corpus, tmp_path, "run.name=parts"))
    whole, parts = rows(tmp_path, "whole"), rows(tmp_path, "parts")
    if before == after:
        assert parts == whole
    else:
        for row, expected in zip(parts, whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-5)


def test_bf16_repeats_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    """The same seed, machine and layout: the same bits, in the precision people train in."""
    curves = []
    for name in ("first", "second"):
        overrides = (f"run.name={name}", "train.precision=bf16")
        train_on(Layout(tp=2, dp=2), settings(corpus, tmp_path, *overrides))
        curves.append(rows(tmp_path, name))
    assert curves[0] == curves[1]
    assert curves[0][-2]["train/loss"] < 0.95 * curves[0][0]["train/loss"]


# --- the command line ---


def command(ranks: int, arguments: list[str]) -> list[str]:
    """The command that a person would type."""
    program = [str(REPOSITORY / "train.py"), *arguments]
    if ranks == 1:
        return [sys.executable, *program]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, *program, f"parallel.tensor_model_parallel_size={ranks}"]


def start(ranks: int, arguments: list[str]) -> "subprocess.Popen[str]":
    """Start a run, away from the repository and in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(ranks, arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", expected: int = 0) -> str:
    """Wait for the end; returns what was printed."""
    output, _ = process.communicate(timeout=100)
    assert process.returncode == expected, output
    return output


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Poll until something has happened in the run folder."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(directory: Path) -> int:
    """Lines in metrics.jsonl so far."""
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


LONG = ("train.train_steps=40", "checkpoint.save_interval=5", "evaluate.interval=0")


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run of forty steps that nothing happens to."""
    directory = tmp_path_factory.mktemp("unbroken")
    finish(start(2, settings(corpus, directory, *LONG)))
    return rows(directory)


@pytest.mark.parametrize("victim", ["launcher", "everything", "one rank"])
def test_kill_9_loses_nothing(
    corpus: Path, tmp_path: Path, unbroken: list[dict[str, Any]], victim: str
) -> None:
    """Killed in the middle and started again: every loss is the unbroken run's, to the bit."""
    arguments = settings(corpus, tmp_path, *LONG)
    process = start(2, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 12, process)
    workers = list(workers_of(tmp_path))
    assert len(workers) == 2
    if victim in ("launcher", "everything"):
        process.kill()
    if victim != "launcher":
        for worker in workers if victim == "everything" else workers[1:]:
            os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=60)
    output = finish(start(2, arguments))
    assert "resuming from" in output
    assert rows(tmp_path) == unbroken


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_saves_and_the_run_goes_on(
    corpus: Path, tmp_path: Path, number: signal.Signals, ranks: int
) -> None:
    """Ctrl-C or SIGTERM: all ranks save the same step, and the run says how to resume."""
    arguments = settings(corpus, tmp_path, *LONG, "checkpoint.save_interval=0")
    process = start(ranks, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 3, process)
    process.send_signal(number)
    output = finish(process, expected=128 + number if ranks == 1 else 1)
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 128 + number
    assert f"run test stopped by {number.name}: step {report['step']} of 40" in output
    assert report["resume"] in output
    (saved,) = (tmp_path / "test" / "checkpoints").iterdir()
    assert saved.name == f"step_{report['step']:08d}"
    assert f"resuming from {saved}" in finish(start(ranks, arguments))
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 41))


def test_the_run_folder_holds_what_it_should(corpus: Path, tmp_path: Path) -> None:
    """Every file of the contract, no pickle; finished again says so; a moved folder goes on."""
    arguments = settings(corpus, tmp_path, "logging.wandb=offline")
    finish(start(1, arguments))
    folder = tmp_path / "test"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "exit.json",
        "metrics.jsonl",
        "tokenizer.model",
        "wandb",
    }
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    for path in folder.rglob("*"):
        if path.is_file() and "wandb" not in path.parts:
            start_of_file = path.read_bytes()[:2]
            assert start_of_file[:1] != b"\x80", f"{path} may be a pickle"
            assert start_of_file != b"PK", f"{path} may be torch's zip of pickles"
    assert "is finished" in finish(start(1, arguments))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6]
    folder.rename(tmp_path / "moved")
    extended = settings(corpus, tmp_path, "run.name=moved", "train.train_steps=7")
    assert "resuming from" in finish(start(1, extended))


def test_what_may_not_change_is_refused(corpus: Path, tmp_path: Path) -> None:
    """A resume with another model, seed or global batch names the keys and changes nothing."""
    finish(start(1, settings(corpus, tmp_path)))
    files = [
        tmp_path / "test" / name for name in ("metrics.jsonl", "config.yaml", "tokenizer.model")
    ]
    before = [path.read_bytes() for path in files]
    changes = ("model.num_layers=3", "train.global_batch_size=4", "run.seed=5")
    output = finish(start(1, settings(corpus, tmp_path, *changes)), expected=2)
    assert "Traceback" not in output
    for change in changes:
        assert f"{change} (was " in output
    assert [path.read_bytes() for path in files] == before


def test_must_never_and_in_use(corpus: Path, tmp_path: Path) -> None:
    """`must` with nothing there is an error; a second writer is refused; `never` loses nothing."""
    arguments = settings(corpus, tmp_path, "train.train_steps=400", "evaluate.interval=0")
    output = finish(start(1, [*arguments, "run.resume=must"]), expected=2)
    assert "run.resume=must, but there is no checkpoint in" in output
    first = start(1, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 3, first)
    output = finish(start(1, arguments), expected=2)
    assert f"is in use by process {first.pid} on " in output
    first.send_signal(signal.SIGTERM)
    finish(first, expected=143)
    kept = (tmp_path / "test" / "metrics.jsonl").read_bytes()
    finish(start(1, [*arguments, "run.resume=never", "run.stop_at_step=2"]))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    previous = tmp_path / "test" / "previous_1"
    assert (previous / "metrics.jsonl").read_bytes() == kept
    assert list((previous / "checkpoints").glob("step_*"))


def test_the_resume_line_goes_on(corpus: Path, tmp_path: Path) -> None:
    """What exit.json says after run.stop_at_step, typed as it stands, finishes the run."""
    once = settings(corpus, tmp_path, "run.stop_at_step=2", "run.resume=never")
    assert "reached run.stop_at_step=2: step 2 of 6" in finish(start(1, once))
    line = json.loads((tmp_path / "test" / "exit.json").read_text())["resume"]
    assert line.startswith("python ")
    arguments = line.partition("train.py ")[2].split()
    assert "run test is finished: step 6 of 6 (4 in this launch)" in finish(start(1, arguments))


def test_a_run_that_is_not_finite_ends(corpus: Path, tmp_path: Path) -> None:
    """Exit code 5, and no save: what was saved before stays."""
    finish(start(1, settings(corpus, tmp_path, "run.stop_at_step=2")))
    wild = settings(corpus, tmp_path, "optimizer.lr=1e30", "optimizer.clip_grad=0")
    output = finish(start(1, wild), expected=5)
    assert "Traceback" not in output
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 5
    assert "the run has ended without saving" in report["reason"]
    assert [path.name for path in (tmp_path / "test" / "checkpoints").iterdir()] == [
        "step_00000002"
    ]
