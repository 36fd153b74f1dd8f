"""wandb as a view of metrics.jsonl: what it is sent, on one axis and once, online and offline."""

import json
import logging
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.sdk.lib import wbauth

from configs import LoggingConfig, parse_config
from tests.distributed import Layout, distributed
from tests.lines import ROOT
from tests.wandb_server import KEY, WandbServer, logs, records, serve, sync
from tracking import wandb_run
from tracking.wandb_run import Launch, about
from tracking.wandb_view import WandbView
from training.state import begun_id, curve_fingerprint

ABOUT = {"optimizer": {"lr": 1e-3}, "layout": {"tp": 2, "dp": 1}, "num_parameters": 1234}
ID = "abc123"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No account on this machine, whoever runs the tests; wandb's own files are kept apart."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """What wandb takes for its own; sent rows each second (the least there is), not each 15 s."""
    with serve() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
        yield server
        wandb.teardown()


class Training:
    """Writes what a run would write, and is watched by wandb."""

    def __init__(
        self, folder: Path, mode: Any = "auto", step: int = 0, curve_fingerprint: str = "A"
    ) -> None:
        self.folder, self.step = folder, step
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = folder / name
            path.touch()
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        launch = Launch(ID, step, curve_fingerprint, ABOUT)
        self.view = WandbView(LoggingConfig(wandb=mode), folder, launch)

    def to(self, last: int, evaluate_at: tuple[int, ...] = ()) -> "Training":
        """Train to this step."""
        for step in range(self.step + 1, last + 1):
            row = {"step": step, "tokens": 10 * step, "train/loss": 1 / step}
            self._write("metrics.jsonl", row | {"speed/tokens_per_second": 36.0})
            if step in evaluate_at:
                self._write("metrics.jsonl", {"step": step, "eval/loss": abs(step - 4) + 0.5})
                self._write("samples.jsonl", {"step": step, "text": f"def at_{step}(self):\n"})
        self.step = last
        return self

    def save(self) -> None:
        """What a checkpoint of this step leaves."""
        (self.folder / "checkpoints" / f"step_{self.step:08d}").mkdir()

    def end(self, *, failed: bool = False) -> float:
        """Seconds that it has to wait for wandb."""
        started_at = time.monotonic()
        self.view.finish(failed=failed)
        return time.monotonic() - started_at

    def _write(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(row) + "\n")


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of all launches."""
    return [row["item"] for log in logs(folder) for row in records(log, "history")]


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in history(folder)]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_offline_run_reads_back(tmp_path: Path) -> None:
    """Without a key: every row once with step and tokens, its evaluation in it, and the rest."""
    training = Training(tmp_path / "gpt").to(5, evaluate_at=(3, 5))
    training.save()
    training.end()
    (log,) = logs(tmp_path / "gpt")
    assert log.parent.name.startswith("offline-run-")
    rows = history(tmp_path / "gpt")
    assert [(row["step"], row["tokens"], row["train/loss"]) for row in rows] == [
        (step, 10 * step, 1 / step) for step in range(1, 6)
    ]
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 5]
    table = json.loads((log.parent / "files" / rows[4]["samples.path"]).read_text())
    assert table["columns"] == ["step", "text"]
    assert table["data"] == [[3, "def at_3(self):\n"], [5, "def at_5(self):\n"]]
    assert {row["step_metric"] for row in records(log, "metric") if "glob_name" in row} == {"step"}
    (run,) = records(log, "run")
    assert (run["run_id"], run["display_name"], run["project"]) == (ID, "gpt", "microtron")
    config: dict[str, Any] = {}
    for record in records(log, "config"):
        config |= record["update"]
    assert {key: config[key] for key in ABOUT} == ABOUT
    summary: dict[str, Any] = {}
    for record in records(log, "summary"):
        summary |= record["update"]
    assert summary["best/eval_loss"] == 1.5
    assert summary["best/step"] == 3
    assert summary["checkpoint"] == "step_00000005"
    assert (summary["total/steps"], summary["total/tokens"]) == (5, 50)
    assert summary["total/training_hours"] == pytest.approx(50 / 36 / 3600)
    assert [record["exit_code"] for record in records(log, "exit")] == [0]


def test_a_resume_draws_one_curve(tmp_path: Path) -> None:
    """Steps that are done again are sent once, also those that the first launch has not got out."""
    Training(tmp_path, "offline").to(40, evaluate_at=(10,)).end()
    (first,) = logs(tmp_path)
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])  # the machine has died
    kept = steps(tmp_path)
    assert kept == list(range(1, len(kept) + 1))
    assert 10 < len(kept) < 35
    Training(tmp_path, "offline", step=35).to(45, evaluate_at=(40,)).end()
    Training(tmp_path, "offline", step=42).to(44).end()  # and does no new step
    logs(tmp_path)[-1].write_bytes(b":W&")  # nor has it got far
    Training(tmp_path, "offline", step=42).to(47).end()
    assert steps(tmp_path) == list(range(1, 48))
    assert [row["step"] for row in history(tmp_path) if "eval/loss" in row] == [10, 40]


def test_steps_that_differ_are_sent_again(tmp_path: Path) -> None:
    """Rows after the checkpoint are sent again when the curve has changed, and only they."""
    Training(tmp_path, "offline").to(10).end()
    Training(tmp_path, "offline", step=6, curve_fingerprint="B").to(8).end()
    Training(tmp_path, "offline", step=6, curve_fingerprint="B").to(12).end()
    rows = history(tmp_path)
    assert [row["step"] for row in rows] == [*range(1, 11), 7, 8, 9, 10, 11, 12]
    assert [row["curve_fingerprint"] for row in rows] == 10 * ["A"] + 6 * ["B"]


def test_what_makes_steps_differ() -> None:
    """Settings of how to train and passed-over samples; not where and on how many ranks."""
    config = ["config=gpt_debug.yaml"]
    same = curve_fingerprint(parse_config(config))
    for change in (
        "parallel.sequence_parallel=false",
        "train.micro_batch_size=1",
        "run.name=other",
        "evaluate.interval=7",
    ):
        assert curve_fingerprint(parse_config([*config, change])) == same, change
    for change in ("optimizer.lr=3e-3", "run.seed=7", "train.precision=fp32"):
        assert curve_fingerprint(parse_config([*config, change])) != same, change
    assert curve_fingerprint(parse_config(config), ((4, 32, 64),)) != same


def test_a_run_that_dies_before_its_first_checkpoint_keeps_its_id(tmp_path: Path) -> None:
    """It does the same steps again; another run in the folder gets an id of its own."""
    assert begun_id(tmp_path, "A") is None
    Training(tmp_path, "offline").to(3).end()
    assert begun_id(tmp_path, "A") == ID
    assert begun_id(tmp_path, "B") is None
    Training(tmp_path, "offline").to(5).end()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_rows_arrive_while_training_and_a_resume_goes_on(
    tmp_path: Path, server: WandbServer
) -> None:
    """Online: live, resumed by the server's word, with nothing of this machine in any request."""
    training = Training(tmp_path / "gpt").to(6, evaluate_at=(3,))
    wait_until(lambda: ID in server.runs and server.runs[ID].steps == [1, 2, 3, 4, 5])
    run = server.runs[ID]
    assert run.exit_code is None
    training.end(failed=True)
    assert (run.steps, run.exit_code) == ([1, 2, 3, 4, 5, 6], 1)
    assert json.loads(run.files[run.history[2]["samples"]["path"]])["data"] == [
        [3, "def at_3(self):\n"]
    ]
    for log in logs(tmp_path / "gpt"):
        log.unlink()  # it is not asked
    training = Training(tmp_path / "gpt", step=4).to(9, evaluate_at=(7,))
    training.save()
    training.end()
    assert (run.steps, run.exit_code) == (list(range(1, 10)), 0)
    assert [row["_step"] for row in run.history] == list(range(9))
    assert run.config["layout"]["value"] == ABOUT["layout"]
    assert {key: run.summary[key] for key in ("best/step", "total/steps", "checkpoint")} == {
        "best/step": 3,
        "total/steps": 9,
        "checkpoint": "step_00000009",
    }
    said = "\n".join(server.requests)
    for private in (str(tmp_path), str(ROOT), sys.executable, f'"{socket.gethostname()}"'):
        assert private not in said, private


def test_sync_makes_one_history_of_two_launches(tmp_path: Path, server: WandbServer) -> None:
    """Offline, killed before the end of its second launch, and sent later."""
    Training(tmp_path, "offline").to(10, evaluate_at=(5,)).end()
    Training(tmp_path, "offline", step=8).to(14, evaluate_at=(12,)).end()
    assert server.runs == {}
    sync(tmp_path)
    run = server.runs[ID]
    assert run.steps == list(range(1, 15))
    assert [row["_step"] for row in run.history] == list(range(14))
    assert run.summary["best/step"] == 5
    sync(tmp_path)
    Training(tmp_path, step=14).to(15).end()
    assert run.steps == list(range(1, 16))


def test_offline_rows_that_wait_for_sync_are_not_sent_again(
    tmp_path: Path, server: WandbServer
) -> None:
    """A run that goes on online leaves to `wandb sync` what it has been entrusted with."""
    Training(tmp_path, "offline").to(5).end()
    Training(tmp_path, step=4).to(8).end()
    assert server.runs[ID].steps == [6, 7, 8]
    sync(tmp_path)
    assert sorted(server.runs[ID].steps) == list(range(1, 9))


def test_a_server_that_never_answers_holds_nothing_up(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training starts at once and its end is soon; all rows are in a file for `wandb sync`."""
    monkeypatch.setattr(wandb_run, "BEGIN_TIMEOUT_S", 2.0)
    server.answers = False
    started_at = time.monotonic()
    training = Training(tmp_path).to(5, evaluate_at=(3,))
    assert time.monotonic() - started_at < 0.5
    assert training.end() < 10
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    wandb.teardown()
    server.answers = True
    sync(tmp_path)
    assert server.runs[ID].steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["falls silent", "dies"])
def test_a_server_that_is_lost_costs_nothing_but_time_at_the_end(
    tmp_path: Path,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    """In the middle of training; the next launch, or `wandb sync`, sends the rest."""
    for name in ("BEGIN_TIMEOUT_S", "END_TIMEOUT_S"):
        monkeypatch.setattr(wandb_run, name, 2.0)
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 2)  # what a table waits for
    training = Training(tmp_path).to(4)
    wait_until(lambda: ID in server.runs and server.runs[ID].steps == [1, 2, 3])
    server.answers = False
    if fault == "dies":
        server.shutdown()
        server.server_close()
    assert training.to(500, evaluate_at=(10,)).end() < 15
    assert "wandb sync --include-online" in caplog.text
    if fault == "falls silent":
        server.answers = True
        Training(tmp_path, step=490).to(510).end()
        assert server.runs[ID].steps == list(range(1, 511))
    else:
        with serve() as another:
            monkeypatch.setenv("WANDB_BASE_URL", another.url)
            sync(tmp_path, "--include-online")
            assert another.runs[ID].steps == list(range(1, 501))


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    """Not even a folder, nor a thread."""
    training = Training(tmp_path, "disabled").to(2)
    assert training.end() < 1
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """Whatever it raises, wherever: one warning, and then silence."""

    def fail(*_: object, **__: object) -> None:
        raise wandb.errors.CommError("no route to host")

    with monkeypatch.context() as patches:
        patches.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
        Training(tmp_path, "offline").to(2).end()
    assert caplog.text.count("no route to host") == 1


def test_no_secret_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment or in the arguments of the process is in none of wandb's files."""
    monkeypatch.setenv("MY_SECRET_TOKEN", "s3cr3t-environment")
    monkeypatch.setattr("sys.argv", ["train.py", "s3cr3t-argument"])
    Training(tmp_path, "offline").to(1).end()
    for path in (tmp_path / "wandb").rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path


@distributed(Layout(tp=2))
def test_what_is_said_about_a_run(mesh: Any, corpus: Path) -> None:
    """Settings, size, layout and environment; of paths nothing but the name of a hub's data set."""
    mixture = f"data.sources=[{{source: text, path: {corpus}, weight: 2}}]"
    folder = ("data.source=hub", f"data.path={corpus.parent}")  # in place of a name
    for overrides in (("data.source=text", f"data.path={corpus}"), (mixture,), folder):
        said = about(parse_config(["config=gpt_debug.yaml", *overrides]), mesh)
        assert str(corpus.parent) not in json.dumps(said)
        assert "/" not in json.dumps(said["data"]) + json.dumps(said["run"])
    assert said["layout"]["world"] == said["layout"]["tp"] * said["layout"]["dp"] == mesh.world.size
    assert said["optimizer"]["lr"] == parse_config(["config=gpt_debug.yaml"]).optimizer.lr
    assert said["environment"]["device_type"] == "cpu"
    assert said["environment"]["device"]
    hub = ("data.source=hub", "data.path=org/books")
    assert about(parse_config(["config=gpt_debug.yaml", *hub]), mesh)["data"]["path"] == "org/books"


@pytest.mark.parametrize("host", ["the default", "http://localhost:4321"])
def test_a_key_is_found_where_wandb_login_writes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    """In netrc, under whatever name wandb gives the server; a key of another server is none."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if host != "the default":
        monkeypatch.setenv("WANDB_BASE_URL", host)
    assert not wandb_run._has_key(wandb)
    wandb.teardown()
    url = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    wbauth.write_netrc_auth(host=url, api_key=KEY)
    assert wandb_run._has_key(wandb)
    wandb.teardown()
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    assert not wandb_run._has_key(wandb)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    assert not wandb_run._has_key(wandb)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"id": "x"}', '{"id": "x", "curve_fingerprint": "B"}']
)
def test_torn_notes_are_no_notes(tmp_path: Path, content: str) -> None:
    """A run that died at a bad moment starts anew in wandb, and starts."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "begun.json").write_text(content)
    assert begun_id(tmp_path, "A") is None
