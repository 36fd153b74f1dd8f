"""The wandb history of a run of train.py that is killed, and goes on on other ranks."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import finish, rows, settings, start, steps_done, wait_for, workers_of
from tests.wandb_server import KEY, WandbServer, logs, records, serve, sync

LAST = 40
DATA_PARALLEL = "parallel.tensor_model_parallel_size=1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """For who has its key."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # of the tests' own use of wandb
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


@pytest.mark.drill
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_killed_twice_and_moved_it_draws_one_curve(
    corpus: Path, tmp_path: Path, server: WandbServer, mode: str
) -> None:
    """TP=1, killed with no checkpoint; TP=1 again; TP=2, killed; DP=2: each step once."""
    folder = tmp_path / "test"
    arguments = settings(
        corpus,
        tmp_path,
        f"train.train_steps={LAST}",
        "train.global_batch_size=16",
        "train.micro_batch_size=1",  # slow enough to be met
        "evaluate.interval=10",
        f"logging.wandb={mode}",
    )

    def wandb_has() -> list[dict[str, Any]]:
        if mode == "offline":
            return [row["item"] for log in logs(folder) for row in records(log, "history")]
        return [row for run in server.runs.values() for row in run.history]

    def kill_when(ranks: int, has: Callable[[], bool], *more: str) -> None:
        process = start(ranks, [*arguments, *more])
        wait_for(has, process)
        for victim in (process.pid, *workers_of(tmp_path)):
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=60)

    kill_when(1, lambda: len(wandb_has()) >= 3)
    finish(start(1, [*arguments, "run.stop_at_step=8"]))
    at_8 = len(wandb_has())
    kill_when(2, lambda: len(wandb_has()) >= at_8 + 4)
    killed_at, had = steps_done(tmp_path), len(wandb_has())
    output = finish(start(2, [*arguments, DATA_PARALLEL]))
    assert f"resuming from {folder / 'checkpoints' / 'step_00000008'}" in output
    assert "metrics.jsonl has everything" not in output

    assert 8 < had <= killed_at
    if mode == "offline":
        assert server.requests == []
        assert len(logs(folder)) == 4
        sync(folder)
    (run,) = server.runs.values()
    assert run.steps == list(range(1, LAST + 1))
    assert [row["_step"] for row in run.history] == list(range(LAST))
    curve = {row["step"]: {**row} for row in run.history}
    truth: dict[int, dict[str, Any]] = {}
    for row in rows(tmp_path):
        truth[row["step"]] = truth.get(row["step"], {}) | row
    for step, row in truth.items():  # done again on other ranks, rounding may differ
        assert {key: curve[step][key] for key in row} == pytest.approx(row, rel=1e-4), step
    assert run.config["layout"]["value"] == {"tp": 1, "dp": 2, "sp": False, "world": 2}
    assert run.summary["checkpoint"] == f"step_{LAST:08d}"
    assert run.summary["total/steps"] == LAST
    best = min((row for row in truth.values() if "eval/loss" in row), key=lambda r: r["eval/loss"])
    assert run.summary["best/step"] == best["step"]
    tables = [json.loads(text) for name, text in run.files.items() if "samples" in name]
    assert max(len(table["data"]) for table in tables) == LAST // 10


@pytest.mark.drill
def test_the_stop_button_saves(corpus: Path, tmp_path: Path, server: WandbServer) -> None:
    """Pressed in wandb's page, it is Ctrl-C: wandb asks for it every 15 s."""
    more = ("train.train_steps=100000", "evaluate.interval=0", "logging.wandb=online")
    process = start(1, settings(corpus, tmp_path, *more))
    wait_for(lambda: any(run.history for run in server.runs.values()), process)
    server.stops = True
    output = finish(process, expected=130)
    (run,) = server.runs.values()
    assert f"run test stopped by SIGINT: step {run.steps[-1]} of 100000" in output
    assert run.summary["checkpoint"] == f"step_{run.steps[-1]:08d}"
