"""The watchdog detects a hang in time, names the stuck rank, saves stacks, ends the run."""

import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from configs import parse_config
from parallel.collectives import Pending, move_to
from tests.fork_server import Program
from tests.runs import LONG, finish, ranks_of, rows, settings, start, steps_done, wait_for
from training.state import Run
from training.watchdog import EXIT_HANG, Beat, Watchdog, blame

LIMIT_S = 4.0
WATCHED = (*LONG, f"run.hang_timeout_s={LIMIT_S}")
# The watchdog needs up to a quarter of the limit more; the rest is for a busy machine.
ENDED_WITHIN_S = 1.25 * LIMIT_S + 15.0
STUCK, HOLDS_THE_LOCK, SLOW = (
    "time.sleep(1000)",
    # PyDLL keeps the GIL; a mutex locked twice waits forever, even for signals.
    "m = ctypes.create_string_buffer(64); [ctypes.PyDLL(None).pthread_mutex_lock(m) for _ in 'ab']",
    f"time.sleep({LIMIT_S / 2})",
)
# Python runs this at its start, in a process that has the folder in PYTHONPATH.
_SITECUSTOMIZE = """
import ctypes, os, sys, threading, time

def misbehave():
    while not hasattr(sys.modules.get("{module}"), "{owner}"):
        time.sleep(0.01)
    owner, calls = sys.modules["{module}"].{owner}, iter(range(1, 10**9))
    original = owner.{method}
    def replacement(*arguments, **settings):
        if next(calls) == {call}:
            {action}
        return original(*arguments, **settings)
    owner.{method} = replacement

if os.environ.get("RANK", "0") == "{rank}" and "-m" not in sys.orig_argv:
    threading.Thread(target=misbehave, daemon=True).start()
"""


def inject(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    rank: int,
    action: str,
    call: int = 7,
    method: str = "data.loader.BatchLoader.__next__",
) -> None:
    """Make a rank of later runs do something in the n-th call of a method."""
    folder.mkdir()
    module, owner, name = method.rsplit(".", 2)
    place = {"module": module, "owner": owner, "method": name}
    text = _SITECUSTOMIZE.format(action=action, rank=rank, call=call, **place)
    (folder / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def hang_report(directory: Path) -> str:
    report = json.loads((directory / "test" / "exit.json").read_text())
    assert report["code"] == EXIT_HANG
    assert "train.py" in report["resume"]
    return str(report["reason"])


def stacks(directory: Path, rank: int) -> str:
    (path,) = (directory / "test" / "stacks").glob(f"step_*.rank_{rank}.txt")
    return path.read_text()


def stop_in_the_middle(process: Program, directory: Path, rank: int) -> int:
    """Send SIGSTOP to a rank; return its process id once it is gone."""
    wait_for(lambda: steps_done(directory) >= 12, process)
    stopped = ranks_of(directory)[rank]
    os.kill(stopped, signal.SIGSTOP)
    stopped_at = time.monotonic()
    while stopped in ranks_of(directory).values():
        assert time.monotonic() - stopped_at < ENDED_WITHIN_S
        time.sleep(0.05)
    return stopped


def beat_during(blocks: Callable[[Callable[[float], object]], object], tmp_path: Path) -> Beat:
    """The beat of a rank in a function that blocks in the function that it is given."""
    folder = SimpleNamespace(path=tmp_path, step=3)
    config = parse_config(["config=gpt_debug", "run.hang_timeout_s=4"])
    watchdog = Watchdog(cast(Run, SimpleNamespace(config=config, folder=folder, mesh=None)))
    watchdog._story = sys._getframe().f_code.co_filename

    is_sampled = threading.Event()

    def sample() -> None:
        time.sleep(0.4)
        watchdog._sample(1.0)
        is_sampled.set()

    sampler = threading.Thread(target=sample)
    sampler.start()
    blocks(is_sampled.wait)
    sampler.join()
    return watchdog._beat


def test_awaiting_an_asynchronous_collective_is_waiting(tmp_path: Path) -> None:
    """Work.wait has no torch frame in Python, so the rank would otherwise be blamed."""

    def blocks(wait: Callable[[float], object]) -> None:
        work = cast(dist.Work, SimpleNamespace(wait=functools.partial(wait, 60)))
        Pending(torch.ones(1), [work]).wait()

    beat = beat_during(blocks, tmp_path)
    assert beat.is_waiting
    assert beat.line.startswith("parallel/collectives.py:")


def test_a_copy_from_the_device_is_waiting(tmp_path: Path) -> None:
    """With NCCL the host waits in the copy of a result; the report shows its caller."""

    def blocks(wait: Callable[[float], object]) -> None:
        move_to(cast(torch.Tensor, SimpleNamespace(to=wait)), cast(torch.device, 60))

    beat = beat_during(blocks, tmp_path)
    assert beat.is_waiting
    assert beat.line.startswith("tests/training/test_watchdog.py:")
    assert not beat_during(lambda wait: wait(60), tmp_path).is_waiting


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_resumes(
    corpus: Path, tmp_path: Path, unbroken: list[dict[str, Any]]
) -> None:
    """After SIGSTOP of rank 1, a run with --max-restarts finishes with the same losses."""
    process = start(2, settings(corpus, tmp_path, *WATCHED), ("--max-restarts=1",))
    stopped = stop_in_the_middle(process, tmp_path, rank=1)
    output = finish(process)
    assert f"rank 1 (host {socket.gethostname()}, process {stopped}) has stopped" in output
    assert "[rank 0] rank 0 (host" in output
    assert "Thread" not in output
    assert output.count("resuming from") == 1
    assert rows(tmp_path) == unbroken


@pytest.mark.slow
def test_a_stopped_rank_0_is_named_by_another(corpus: Path, tmp_path: Path) -> None:
    """Rank 0 usually writes exit.json, but no longer can."""
    process = start(2, settings(corpus, tmp_path, *WATCHED))
    stopped = stop_in_the_middle(process, tmp_path, rank=0)
    output = finish(process, expected=1)
    reason = hang_report(tmp_path)
    assert f"rank 0 (host {socket.gethostname()}, process {stopped}) has stopped" in reason
    # Usually in train_step; on a busy machine perhaps between two steps.
    assert re.search(r"was last seen in \w+, after step \d+", reason)
    assert reason in output
    assert "[rank 1] rank 1 (host" in output
    assert "Thread" not in output
    assert "_wait" in stacks(tmp_path, rank=1)


def test_a_single_process_blames_itself(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stack shows where it is stuck."""
    inject(monkeypatch, tmp_path / "inject", 0, STUCK)
    output = finish(start(1, settings(corpus, tmp_path, *WATCHED)), expected=EXIT_HANG)
    assert f"host {socket.gethostname()}" in hang_report(tmp_path)
    assert "makes no progress in train_step, after step 6, at training/step.py:" in hang_report(
        tmp_path
    )
    assert "sitecustomize.py" in stacks(tmp_path, rank=0)
    assert "Thread" not in output


@pytest.mark.slow
def test_a_slow_run_is_no_hang(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow step, evaluations, saves and the end, all within the limit."""
    inject(monkeypatch, tmp_path / "inject", 1, SLOW)
    often = ("evaluate.interval=4", "checkpoint.save_interval=4", "train.train_steps=12")
    output = finish(start(2, settings(corpus, tmp_path, *WATCHED, *often)))
    assert "run test is finished" in output
    assert "Thread" not in output


@pytest.mark.drill
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", [STUCK, HOLDS_THE_LOCK], ids=["data", "lock"])
def test_the_right_rank_is_blamed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, rank: int
) -> None:
    """Stuck reading data, or in C code that keeps the GIL, on either rank."""
    inject(monkeypatch, tmp_path / "inject", rank, action)
    output = finish(start(2, settings(corpus, tmp_path, *WATCHED)), expected=1)
    assert f"{LIMIT_S:g} s (run.hang_timeout_s): rank {rank} (" in hang_report(tmp_path)
    # With the GIL held no Python runs there, and faulthandler writes to stderr.
    assert "sitecustomize.py" in (stacks(tmp_path, rank) if action == STUCK else output)


@pytest.mark.slow
def test_a_rank_that_never_answered_is_blamed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops at its first batch, before the watchdog's first interval ends."""
    inject(monkeypatch, tmp_path / "inject", 0, HOLDS_THE_LOCK, call=1)
    limit = f"run.hang_timeout_s={2 * LIMIT_S}"  # the backstop ends rank 0 after 1.5 of it
    finish(start(2, settings(corpus, tmp_path, *LONG, limit)), expected=1)
    expected = (
        r"rank 0 \(.*\) has stopped answering, and was last seen in \w+, after step 0, at \w+"
    )
    assert re.search(expected, hang_report(tmp_path))


@pytest.mark.slow
def test_a_rank_stuck_after_a_rollback_is_blamed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops as it prepares to read the batches that follow."""
    finish(start(2, settings(corpus, tmp_path, "run.stop_at_step=2")))
    inject(monkeypatch, tmp_path / "inject", 1, STUCK, 2, "data.loader.BatchLoader.__init__")
    wild = ("optimizer.lr=1e30", "optimizer.clip_grad=0", "train.max_consecutive_skips=1")
    limit = f"run.hang_timeout_s={LIMIT_S}"
    output = finish(start(2, settings(corpus, tmp_path, *wild, limit)), expected=1)
    assert "rolling back" in output
    expected = r"rank 1 \(.*\) makes no progress in training_batches, after step \d, at training/"
    assert re.search(expected, hang_report(tmp_path))


@pytest.mark.slow
def test_a_finished_run_that_hangs_in_its_clean_up_has_finished(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while wandb waits for a dead server: the process ends with the code in exit.json."""
    finish_log = "tracking.wandb_forwarder.WandbForwarder.finish"
    inject(monkeypatch, tmp_path / "inject", 0, STUCK, 1, finish_log)
    finish(start(1, settings(corpus, tmp_path, f"run.hang_timeout_s={LIMIT_S}")))
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert (report["code"], report["reason"]) == (0, "finished")


# A file system that is slow to make a file of a checkpoint durable.
_SLOW_FILES = """
import os, time
_fsync = os.fsync

def fsync(descriptor):
    _fsync(descriptor)
    if "rank_0000{rank}." in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        time.sleep({seconds})

os.fsync = fsync
"""


def slow_down_files(
    monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int, seconds: float
) -> None:
    """Make every save of later runs take this long on one rank."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SLOW_FILES.format(rank=rank, seconds=seconds))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.slow
def test_a_last_save_longer_than_the_limit_is_no_hang(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is reported once per limit, and the run ends with its checkpoint."""
    slow_down_files(monkeypatch, tmp_path / "slow", rank=0, seconds=3.5 * LIMIT_S)
    output = finish(start(1, settings(corpus, tmp_path, f"run.hang_timeout_s={LIMIT_S}")))
    assert json.loads((tmp_path / "test" / "exit.json").read_text())["code"] == 0
    assert (tmp_path / "test" / "checkpoints" / "step_00000006").is_dir()
    assert len(re.findall(r"waiting for a file for \d+ s, at checkpoints/save.py", output)) >= 2


@pytest.mark.drill
@pytest.mark.parametrize("rank", [0, 1])
def test_slow_saves_are_no_hang(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """In the background and at the end, on either rank."""
    slow_down_files(monkeypatch, tmp_path / "slow", rank, seconds=2 * LIMIT_S)
    often = ("checkpoint.save_interval=2", "checkpoint.keep=1")
    output = finish(start(2, settings(corpus, tmp_path, f"run.hang_timeout_s={LIMIT_S}", *often)))
    assert "run test is finished" in output
    assert "waiting for a file" in output
    saved = [path.name for path in (tmp_path / "test" / "checkpoints").iterdir()]
    assert saved == ["step_00000006"]


@pytest.mark.drill
def test_a_file_system_that_hangs_ends_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends after ten times the limit and names the rank."""
    slow_down_files(monkeypatch, tmp_path / "slow", rank=1, seconds=1000)
    output = finish(start(2, settings(corpus, tmp_path, "run.hang_timeout_s=2")), expected=1)
    reason = hang_report(tmp_path)
    assert re.search(
        r"rank 1 \(host \S+, process \d+\) waits for a file in CheckpointWriter\.begin, after",
        reason,
    )
    assert output.count("waiting for a file") >= 8


def test_blame() -> None:
    """Blame silent ranks first, then those that do not wait, then those behind, else all."""
    waiting = Beat("host", "m", 1, step=5, is_waiting=True)
    behind, working = (
        Beat("host", "m", 1, step=4, is_waiting=True),
        Beat("host", "m", 1, step=5),
    )
    assert blame({0: waiting, 1: working}, {0: waiting}) == [1]
    assert blame({0: waiting, 1: working, 2: waiting}, {0: waiting, 1: working, 2: waiting}) == [1]
    assert blame({0: waiting, 1: behind}, {0: waiting, 1: behind}) == [1]
    assert blame({0: waiting, 1: waiting}, {0: waiting, 1: waiting}) == [0, 1]
    # Launching a kernel waits if the queue is full, which most ranks then do at the same line.
    reading, launching = (
        Beat("host", "m", 1, step=5, line="a:1"),
        Beat("host", "m", 1, step=5, line="b:2"),
    )
    three = {0: launching, 1: reading, 2: launching}
    assert blame(three, three) == [1]
    assert blame({0: reading, 1: launching}, {0: reading, 1: launching}) == [0, 1]
    most_read = {0: reading, 1: reading, 2: waiting}
    assert blame(most_read, most_read) == [0, 1]


def test_no_thread_without_a_limit() -> None:
    """`run.hang_timeout_s=0` turns the watchdog off."""
    config = parse_config(["config=gpt_debug.yaml", "run.hang_timeout_s=0"])
    run = cast(Run, SimpleNamespace(config=config, folder=None, mesh=None))
    before = threading.enumerate()
    with Watchdog(run) as watchdog:
        watchdog.begin()
        assert threading.enumerate() == before
