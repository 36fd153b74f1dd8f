"""torchrun --max-restarts: a job that loses a process recovers by itself."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs import (
    LONG,
    finish,
    ranks_of,
    rows,
    settings,
    start,
    steps_done,
    wait_for,
    workers_of,
)


def test_killed_ranks_are_restarted(
    corpus: Path, tmp_path: Path, unbroken: list[dict[str, Any]]
) -> None:
    """Killed before the first checkpoint and after it, every loss equals the uninterrupted run's.

    `run.resume=never` applies to the first attempt only: later ones continue its work.
    """
    arguments = settings(corpus, tmp_path, *LONG, "run.resume=never", "checkpoint.save_interval=20")
    process = start(2, arguments, ("--max-restarts=2",))
    attempts: list[set[int]] = []
    for steps in (2, 22):
        wait_for(
            lambda: _is_new(attempts, tmp_path) and steps_done(tmp_path) >= steps,  # noqa: B023
            process,
        )
        workers = sorted(workers_of(tmp_path))
        attempts.append(set(workers))
        os.kill(workers[1], signal.SIGKILL)
    output = finish(process)
    assert output.count("resuming from") == 1
    assert f"resuming from {tmp_path / 'test' / 'checkpoints' / 'step_00000020'}" in output
    assert "run test is finished: step 40 of 40 (20 in this launch)" in output
    assert rows(tmp_path) == unbroken
    assert not list((tmp_path / "test").glob("previous_*"))


@pytest.mark.slow
def test_all_ranks_name_a_killed_rank(corpus: Path, tmp_path: Path) -> None:
    """In one line each, even ranks that share no group with it."""
    arguments = settings(corpus, tmp_path, *LONG, "parallel.tensor_model_parallel_size=2")
    process = start(4, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 2, process)
    killed = ranks_of(tmp_path)[2]
    os.kill(killed, signal.SIGKILL)
    output = finish(process, expected=1)
    reported = re.findall(r"^\[rank (\d)\] (connection lost: .*)$", output, re.MULTILINE)
    assert sorted(rank for rank, _ in reported) == ["0", "1", "3"]
    for _, message in reported:
        assert f"rank 2 (process {killed}) has ended" in message or "after rank 2 had" in message
        assert message.endswith("exit.json has the command that resumes the run")
    reason = json.loads((tmp_path / "test" / "exit.json").read_text())["reason"]
    assert "rank 2" in reason
    # torch begins each line of a traceback like this.
    assert not re.findall(r"^\[rank\d\]:", output, re.MULTILINE)


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_replaced_node_joins_the_others(
    corpus: Path,
    tmp_path: Path,
    unbroken: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two agents with one rank each; the new one counts attempts from 0, the other from 1."""
    # Without it, agents of torch 2.13 do not tell a new one where the store is.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = settings(corpus, tmp_path, *LONG, "parallel.tensor_model_parallel_size=2")
    flags = (
        "--nnodes=2",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-id=drill",
        f"--rdzv-endpoint=localhost:{port}",
        "--local-addr=localhost",
    )
    first = start(1, arguments, flags)
    time.sleep(5)  # it must host the store
    lost = start(1, arguments, flags)
    while steps_done(tmp_path) < 12:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    for pid in (lost.pid, *_children(lost.pid)):
        os.kill(pid, signal.SIGKILL)
    lost.communicate()
    replacement = start(1, arguments, flags)
    output = "".join(process.communicate(timeout=400)[0] for process in (first, replacement))
    assert (first.returncode, replacement.returncode) == (0, 0), output
    assert "resuming from" in output
    # Each rank has all CPUs of its node here, and threads add in another order.
    losses, expected = ([row["train/loss"] for row in r] for r in (rows(tmp_path), unbroken))
    assert losses == pytest.approx(expected, rel=1e-5)


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def _is_new(attempts: list[set[int]], directory: Path) -> bool:
    """Whether there are two ranks, both started after earlier attempts."""
    workers = set(workers_of(directory))
    return len(workers) == 2 and all(workers.isdisjoint(before) for before in attempts)
