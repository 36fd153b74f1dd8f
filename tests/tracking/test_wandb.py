"""wandb: one run on the `step` axis over all launches, and training never waits for it.

The real client talks to a stand-in for its server.
"""

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.sdk.lib import wbauth

from configs import LoggingConfig, parse_config
from parallel import Mesh
from tests.distributed import Layout, distributed
from tests.lines import ROOT
from tests.runs import finish, rows, settings, start, steps_done, wait_for, workers_of
from tests.wandb_server import KEY, WandbServer, logs, records, serve, sync
from tracking import wandb_forwarder
from tracking.wandb_forwarder import WandbForwarder, wandb_config

CONFIG = {"optimizer": {"lr": 1e-3}, "layout": {"tp": 2, "dp": 1}}
ID = "abc123"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide any wandb account of this machine, and keep wandb's own files apart."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """Serve this machine's wandb, which sends rows every second instead of every 15 s."""
    with serve() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
        # For a busy machine; tests of what happens then set their own.
        monkeypatch.setattr(wandb_forwarder, "FINISH_TIMEOUT_S", 60.0)
        monkeypatch.setattr(wandb_forwarder, "MAX_WAIT_S", 120.0)
        yield server
        wandb.teardown()


def begin(folder: Path, steps: range, mode: Any = "auto", wandb_id: str = ID) -> WandbForwarder:
    """Begin a launch that trains these steps and evaluates at every third one."""
    folder.mkdir(exist_ok=True)
    forwarder = WandbForwarder(LoggingConfig(wandb=mode), folder, wandb_id, CONFIG)
    for step in steps:
        forwarder.log({"step": step, "tokens": 10 * step, "train/loss": 1 / step})
        if step % 3 == 0:
            forwarder.log({"step": step, "eval/loss": abs(step - 6) + 0.5})
            forwarder.log({"step": step, "sample": f"def f():\n  <{step}>"})
    return forwarder


def end(forwarder: WandbForwarder, *, failed: bool = False) -> float:
    """Finish a launch; return the seconds that this takes."""
    started_at = time.monotonic()
    forwarder.finish(failed=failed)
    return time.monotonic() - started_at


def history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all launches in wandb's files."""
    return [row["item"] for log in logs(folder) for row in records(log, "history")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_an_offline_run_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key: all rows, the step axis, settings and samples, but no secret."""
    monkeypatch.setenv("MY_SECRET_TOKEN", "s3cr3t-environment")
    monkeypatch.setattr("sys.argv", ["train.py", "s3cr3t-argument"])
    end(begin(tmp_path / "gpt", range(1, 10)))
    (log,) = logs(tmp_path / "gpt")
    assert log.parent.name.startswith("offline-run-")
    written = history(tmp_path / "gpt")
    assert [
        (row["step"], row["tokens"], row["train/loss"]) for row in written if "train/loss" in row
    ] == [(step, 10 * step, 1 / step) for step in range(1, 10)]
    assert [row["step"] for row in written if "eval/loss" in row] == [3, 6, 9]
    samples = [row for row in written if "sample.path" in row]
    assert [row["step"] for row in samples] == [3, 6, 9]
    sample = (log.parent / "files" / samples[0]["sample.path"]).read_text()
    assert "<pre>def f():\n  &lt;3&gt;</pre>" in sample
    assert {row["step_metric"] for row in records(log, "metric") if "glob_name" in row} == {"step"}
    (run,) = records(log, "run")
    assert (run["run_id"], run["display_name"], run["project"]) == (ID, "gpt", "microtron")
    config = {k: v for record in records(log, "config") for k, v in record["update"].items()}
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert [record["exit_code"] for record in records(log, "exit")] == [0]
    for path in (tmp_path / "gpt" / "wandb").rglob("*"):
        assert not path.is_file() or b"s3cr3t" not in path.read_bytes(), path


def test_a_resume_continues_the_online_run(tmp_path: Path, server: WandbServer) -> None:
    """Rows arrive during training; repeated steps are sent again; no request names the machine."""
    forwarder = begin(tmp_path / "gpt", range(1, 8))
    wait_until(lambda: ID in server.runs and server.runs[ID].steps == list(range(1, 8)))
    run = server.runs[ID]
    assert run.exit_code is None
    end(forwarder, failed=True)
    assert run.exit_code == 1
    assert run.summary["eval/loss"]["min"] == 0.5
    end(begin(tmp_path / "gpt", range(5, 11)))
    assert list(server.runs) == [ID]
    assert (run.steps, run.exit_code) == ([*range(1, 8), *range(5, 11)], 0)
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert run.config["layout"]["value"] == CONFIG["layout"]
    requests = "\n".join(server.requests)
    for private in (str(tmp_path), str(ROOT), sys.executable, f'"{socket.gethostname()}"'):
        assert private not in requests, private


def test_sync_merges_offline_launches(tmp_path: Path, server: WandbServer) -> None:
    """The second launch has another id, as if the first had died without a checkpoint."""
    end(begin(tmp_path, range(1, 8), "offline"))
    end(begin(tmp_path, range(6, 10), "offline", wandb_id="another"))
    assert server.runs == {}
    sync(tmp_path)
    assert list(server.runs) == [ID]
    assert server.runs[ID].steps == [*range(1, 8), *range(6, 10)]


def test_a_deleted_run_gets_a_new_id(
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning, in the first launch that the server rejects (HTTP 409); nothing is lost."""
    monkeypatch.setattr(wandb_forwarder, "INIT_TIMEOUT_S", 4.0)  # wandb tries again until then
    server.deleted.add(ID)
    end(begin(tmp_path, range(1, 4)))
    (new_id,) = server.runs
    assert caplog.text.count("WARNING") == 1
    assert f"wandb: run id {ID} is rejected (deleted?); using a new one" in caplog.text
    caplog.clear()
    end(begin(tmp_path, range(4, 6)))
    assert "WARNING" not in caplog.text
    assert list(server.runs) == [new_id]
    assert server.runs[new_id].steps == [1, 2, 3, 4, 5]


def test_a_silent_server_delays_nothing(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training starts at once and ends soon; `wandb sync` uploads all rows later."""
    monkeypatch.setattr(wandb_forwarder, "INIT_TIMEOUT_S", 3.0)
    server.answers = False
    started_at = time.monotonic()
    forwarder = begin(tmp_path, range(1, 6))
    assert time.monotonic() - started_at < 2.5
    assert end(forwarder) < 15
    wandb.teardown()
    server.answers = True
    sync(tmp_path)
    assert server.runs[ID].steps == [1, 2, 3, 4, 5]


def test_a_server_that_dies_delays_only_the_end(
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The warning gives the command that uploads the rest, which it does."""
    monkeypatch.setattr(wandb_forwarder, "FINISH_TIMEOUT_S", 2.0)
    forwarder = begin(tmp_path, range(1, 5))
    wait_until(lambda: ID in server.runs and len(server.runs[ID].steps) == 4)
    server.answers = False
    server.shutdown()
    server.server_close()
    started_at = time.monotonic()
    for step in range(5, 501):
        forwarder.log({"step": step, "train/loss": 1.0})
    forwarder.log({"step": 500, "sample": "a sample"})
    assert time.monotonic() - started_at < 5
    assert end(forwarder) < 15
    assert f"wandb sync --include-online {tmp_path / 'wandb'}" in caplog.text
    with serve() as another:
        monkeypatch.setenv("WANDB_BASE_URL", another.url)
        sync(tmp_path, "--include-online")
        assert another.runs[ID].steps == list(range(1, 501))


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    assert end(begin(tmp_path, range(1, 3), "disabled")) < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no route to host")

    with monkeypatch.context() as patches:
        patches.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
        end(begin(tmp_path, range(1, 3), "offline"))
    assert caplog.text.count("no route to host") == 1


@distributed(Layout(tp=2))
def test_the_config_has_settings_and_no_path(mesh: Mesh, corpus: Path) -> None:
    mixture = f"data.sources=[{{source: text, path: {corpus}, weight: 2}}]"
    for overrides in (("data.source=text", f"data.path={corpus}"), (mixture,)):
        config = wandb_config(parse_config(["config=gpt_debug.yaml", *overrides]), mesh)
        assert "/" not in json.dumps(config["data"]) + json.dumps(config["run"])
    assert config["layout"] == {"pp": 1, "dp": 1, "cp": 1, "tp": 2, "world": 2}
    assert config["optimizer"]["lr"] == parse_config(["config=gpt_debug.yaml"]).optimizer.lr


@pytest.mark.parametrize("key", ["in netrc", "none", "malformed"])
def test_online_only_with_a_key(
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    key: str,
) -> None:
    """wandb reads it from the environment or netrc; without one it logs offline."""
    monkeypatch.delenv("WANDB_API_KEY")
    if key == "in netrc":
        wbauth.write_netrc_auth(host=server.url, api_key=KEY)
    if key == "malformed":
        monkeypatch.setenv("WANDB_API_KEY", "short")
    end(begin(tmp_path, range(1, 3)))
    assert (ID in server.runs) == (key == "in netrc")
    assert ("logging offline, upload with `wandb sync`" in caplog.text) == (key == "malformed")
    assert len(history(tmp_path)) == 2


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_a_killed_run_keeps_its_id(corpus: Path, tmp_path: Path, server: WandbServer) -> None:
    """Killed before and after its first checkpoint, then resumed with dp = 2; later rows count."""
    more = ("train.train_steps=400", "evaluate.interval=100", "logging.wandb=online")
    arguments = settings(corpus, tmp_path, *more)
    for launch in (arguments, [*arguments, "checkpoint.save_interval=5"]):
        process = start(1, launch)
        wait_for(lambda: len(server.runs) == 1 and steps_done(tmp_path) >= 20, process)
        for victim in (process.pid, *workers_of(tmp_path)):
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=300)
    more = ("train.train_steps=30", "parallel.tensor_model_parallel_size=1")
    finish(start(2, [*arguments, *more]))
    (run,) = server.runs.values()
    for row in rows(tmp_path):
        loss = next(key for key in row if key.endswith("/loss"))
        sent = [other for other in run.history if other["step"] == row["step"] and loss in other]
        assert {key: sent[-1][key] for key in row} == row
    assert run.config["layout"]["value"]["dp"] == 2


@pytest.mark.drill
def test_the_stop_button_saves(corpus: Path, tmp_path: Path, server: WandbServer) -> None:
    """The button on wandb's page, polled every 15 s, acts like Ctrl-C."""
    more = ("train.train_steps=100000", "evaluate.interval=0", "logging.wandb=online")
    process = start(1, settings(corpus, tmp_path, *more))
    wait_for(lambda: any(run.history for run in server.runs.values()), process)
    server.stops = True
    output = finish(process, expected=130)
    (run,) = server.runs.values()
    assert f"run test stopped by SIGINT: step {run.steps[-1]} of 100000" in output
