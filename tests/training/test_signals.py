"""Signals in every phase of a run: all ranks save the same step and exit, and the run resumes."""

import contextlib
import itertools
import json
import os
import pty
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, distributed
from tests.runs import (
    LONG,
    config_on,
    finish,
    launch,
    ranks_of,
    rows,
    settings,
    start,
    steps_done,
    wait_for,
)
from train import train
from training import evaluation
from training.run_folder import RunFolder
from training.signals import StopSignals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TARGETS = ("launcher", "all ranks", "one rank")
PHASES = ("start", "training", "evaluation", "saving")
# Every signal, target and phase at least once; `make drills` has all combinations. test_train.py
# has more of "launcher" and "training".
CHOSEN = (
    (signal.SIGUSR1, "launcher", "evaluation"),
    (signal.SIGTERM, "one rank", "saving"),
    (signal.SIGINT, "all ranks", "training"),
    (signal.SIGTERM, "all ranks", "start"),
)
# By default torchrun dies of SIGUSR1 and leaves its workers running.
FLAGS = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",)
# Python runs this at its start, in a process that has the folder in PYTHONPATH. It makes a phase
# long enough to hit. Rank 0 locks the run folder before it does anything else.
_SLOW = """
import fcntl, os, time

def slowed(function, seconds, where):
    def slow(file, *arguments):
        result = function(file, *arguments)
        if where in os.readlink(f"/proc/self/fd/{{file if type(file) is int else file.fileno()}}"):
            time.sleep(seconds)
        return result
    return slow

fcntl.flock = slowed(fcntl.flock, {start_s}, "/test/.lock")
os.fsync = slowed(os.fsync, {save_s}, "/test/checkpoints")
"""


def slow_down(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, start_s: float = 0.0, save_s: float = 0.0
) -> None:
    """Make later runs start, or save, slowly."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SLOW.format(start_s=start_s, save_s=save_s))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def is_in(phase: str, directory: Path) -> bool:
    """Whether a run is in a phase; it evaluates and saves after step 5."""
    run = directory / "test"
    if phase == "start":
        return (run / ".lock").exists() and len(ranks_of(directory)) == 2
    if phase == "saving":
        return any(run.glob("checkpoints/.tmp-*"))
    return steps_done(directory) >= (5 if phase == "evaluation" else 2)


def send(number: signal.Signals, target: str, directory: Path, launcher: int) -> None:
    ranks = ranks_of(directory)
    who = {"launcher": [launcher], "all ranks": list(ranks.values()), "one rank": [ranks[1]]}
    for process in who[target]:
        os.kill(process, number)


def expect_a_clean_stop(
    corpus: Path,
    directory: Path,
    unbroken: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[signal.Signals, str, str],
) -> None:
    """Stop a run in a phase, check what it leaves, and resume it."""
    number, target, phase = case
    with monkeypatch.context() as patch:
        slow_down(
            patch,
            directory / "slow",
            start_s=2.0 if phase == "start" else 0.0,
            save_s=0.5 if phase == "saving" else 0.0,
        )
        arguments = settings(corpus, directory, *LONG)
        evaluating = ("evaluate.interval=5", "evaluate.sample_tokens=1500")
        extra = evaluating if phase == "evaluation" else ()
        process = start(2, settings(corpus, directory, *LONG, *extra), FLAGS)
        wait_for(lambda: is_in(phase, directory), process)
        send(number, target, directory, process.pid)
        output = finish(process, expected=1)
    checkpoints = directory / "test" / "checkpoints"
    saved = sorted(path.name for path in checkpoints.iterdir())
    if phase == "start":
        assert steps_done(directory) == 0
        assert saved == []
        return
    report = json.loads((directory / "test" / "exit.json").read_text())
    assert report["code"] == 128 + number, output
    assert f"run test stopped by {number.name}: step {report['step']} of 40" in output
    assert saved[-1] == f"step_{report['step']:08d}"
    if phase == "evaluation":
        assert report["step"] in (5, 6)
    if phase == "saving":  # in the background, while training goes on
        assert report["step"] >= 5
    assert "resuming from" in finish(start(2, arguments))
    assert [row for row in rows(directory) if "train/loss" in row] == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: f"{case[0].name}-{case[1]}-{case[2]}")
def test_a_signal_stops_all_ranks_at_one_step(
    corpus: Path,
    tmp_path: Path,
    unbroken: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[signal.Signals, str, str],
) -> None:
    """Before the first step there is nothing to save."""
    expect_a_clean_stop(corpus, tmp_path, unbroken, monkeypatch, case)


@pytest.mark.drill
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_any_signal_to_any_process_in_any_phase(
    corpus: Path,
    tmp_path: Path,
    unbroken: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    target: str,
    phase: str,
) -> None:
    expect_a_clean_stop(corpus, tmp_path, unbroken, monkeypatch, (number, target, phase))


@distributed(ONE_RANK, Layout(tp=2, dp=2), Layout(pp=2))
@pytest.mark.parametrize("moment", ["batches", "sample", "end"])
def test_a_signal_ends_an_evaluation_and_the_resume_makes_it(
    mesh: Mesh, corpus: Path, tmp_path: Path, moment: str
) -> None:
    """One rank receives it. The step is saved at once; in the end no row is missing or double."""
    signals, agree_now, calls = StopSignals(), StopSignals.agree_now, itertools.count()
    # Calls 0, 1 and 2 come before the first step and two of the batches. Without the latter, the
    # last ones come before the sample and after it.
    chosen = 3 if moment == "end" else 2

    def agree(signals: StopSignals, mesh: Mesh) -> signal.Signals | None:
        if next(calls) == chosen and mesh.world.rank == mesh.world.size - 1:
            signals.received = signal.SIGTERM
        return agree_now(signals, mesh)

    layout = Layout(tp=mesh.tp.size, dp=mesh.dp.size, pp=mesh.pp.size)
    config = config_on(layout, settings(corpus, tmp_path, "checkpoint.save_interval=0"))
    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "agree_now", agree)
        patch.setattr(evaluation, "_BATCHES_PER_CHECK", 1 if moment == "batches" else 1000)
        assert train(config, mesh, folder, signals) == 143
    evaluated = [row["step"] for row in rows(tmp_path) if "eval/loss" in row]
    assert evaluated == ([3] if moment == "end" else [])
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000003"]
    with RunFolder(config, mesh) as folder:
        assert train(config, mesh, folder, StopSignals()) == 0
    if mesh.world.rank == 0:
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6]
        samples = (tmp_path / "test" / "samples.jsonl").read_text().splitlines()
        assert [json.loads(sample)["step"] for sample in samples] == [3, 6]


def test_a_second_signal_ends_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C does not wait for a long save; the first one announces that."""
    slow_down(monkeypatch, tmp_path / "slow", save_s=30.0)
    process = start(1, settings(corpus, tmp_path, *LONG))
    wait_for(lambda: steps_done(tmp_path) >= 2, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: is_in("saving", tmp_path), process)
    time.sleep(1.1)  # a launcher may deliver one Ctrl-C twice
    process.send_signal(signal.SIGINT)
    sent_at = time.monotonic()
    output = finish(process, expected=130)
    assert time.monotonic() - sent_at < 5.0
    assert output.count("\nsaving; press again to stop now\n") == 1
    assert not list((tmp_path / "test" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_ctrl_c_leaves_the_resume_command_last_on_the_terminal(
    corpus: Path, tmp_path: Path
) -> None:
    """The command comes after the traceback that torchrun prints last."""
    reader, terminal = pty.openpty()
    process = launch(1, settings(corpus, tmp_path, *LONG), ("--standalone",), terminal=terminal)
    os.close(terminal)
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the last process has closed the terminal
            while True:
                chunks.append(os.read(reader, 4096))

    thread = threading.Thread(target=read)
    thread.start()
    while steps_done(tmp_path) < 2:
        assert process.poll() is None, b"".join(chunks)
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=300)
    thread.join(timeout=300)
    text = b"".join(chunks).decode().replace("\r\n", "\n")
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 130
    assert report["resume"].startswith("torchrun --nproc-per-node 1 --standalone ")
    assert text.count("\nsaving; press again to stop now\n") == 1
    assert text.endswith(f"resume with\n  {report['resume']}\n")


def test_the_chosen_cases_cover_every_value() -> None:
    """The few cases of `make test` have every signal, target and phase."""
    for number, values in enumerate((SIGNALS, TARGETS, PHASES)):
        assert {case[number] for case in CHOSEN} == set(values)
