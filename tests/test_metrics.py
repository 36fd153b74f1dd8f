"""metrics.jsonl after a resume, and a wandb that can neither hold up nor end a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import wandb

from configs import LoggingConfig
from metrics import cut_rows
from wandb_view import WandbView


def test_a_resume_cuts_the_file_at_its_step(tmp_path: Path) -> None:
    """Rows after the checkpoint go, and a line that a kill has torn; the rest stays as it is."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "train/loss": 0.1}, {"step": 2}, {"step": 2, "eval/loss": 0.3}, {"step": 3}]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines) + '{"step": 4, "tr')
    cut_rows(path, 2)
    assert path.read_text() == "".join(lines[:3])
    cut_rows(path, 0)
    assert path.read_text() == ""


def view(directory: Path, mode: Any = "auto") -> WandbView:
    config = LoggingConfig(wandb=mode)
    return WandbView(config, directory, "abc123", {"run.seed": 1, "optimizer.lr": 0.001})


@pytest.fixture(autouse=True)
def without_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account on this machine, whoever runs the tests."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_without_a_key_it_logs_offline(tmp_path: Path) -> None:
    """auto needs no account: an offline run with the checkpoint's id, ready for `wandb sync`."""
    dashboard = view(tmp_path)
    dashboard.log({"step": 1, "train/loss": 0.5})
    dashboard.finish(failed=False)
    (log,) = (tmp_path / "wandb").glob("offline-run-*-abc123/run-abc123.wandb")
    assert log.stat().st_size > 0


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    """Not even a folder."""
    dashboard = view(tmp_path, "disabled")
    dashboard.log({"step": 1})
    dashboard.finish(failed=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """Whatever it raises, wherever: one warning, and then silence."""

    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no route to host")

    target = wandb if broken == "init" else wandb.Run
    monkeypatch.setattr(target, broken, fail)
    logging.getLogger("microtron").propagate = True
    dashboard = view(tmp_path, "offline")
    for step in (1, 2):
        dashboard.log({"step": step})
    dashboard.finish(failed=False)
    assert caplog.text.count("no route to host") == 1
    wandb.teardown()


def test_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment or in the arguments of the process is in none of wandb's files."""
    monkeypatch.setenv("MY_SECRET_TOKEN", "s3cr3t-environment")
    monkeypatch.setattr("sys.argv", ["train.py", "s3cr3t-argument"])
    dashboard = view(tmp_path, "offline")
    dashboard.log({"step": 1})
    dashboard.finish(failed=False)
    for path in (tmp_path / "wandb").rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path
