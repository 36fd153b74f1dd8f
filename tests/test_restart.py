"""torchrun --max-restarts: a job that has lost a process comes back without a person."""

import os
import signal
from pathlib import Path
from typing import Any

from tests.runs import LONG, finish, rows, settings, start, steps_done, wait_for, workers_of


def test_killed_ranks_come_back(
    corpus: Path, tmp_path: Path, unbroken: list[dict[str, Any]]
) -> None:
    """Once before there is a checkpoint, and once after: every loss is the unbroken run's.

    `run.resume=never` is meant for the first attempt: the others go on with what that has done.
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


def _is_new(attempts: list[set[int]], directory: Path) -> bool:
    """Whether there are two ranks, none of which was in an attempt before."""
    workers = set(workers_of(directory))
    return len(workers) == 2 and all(workers.isdisjoint(before) for before in attempts)
