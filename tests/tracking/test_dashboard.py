"""The dashboard: each step of each run once, live, whatever happens to the runs."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import ConfigError
from tests.browser import CHROMIUM, browse
from tests.lines import ROOT
from tracking.dashboard import Dashboard, parse
from tracking.live_rows import JsonLines
from tracking.metrics import cut_rows

PATIENCE_S = 60


def write(path: Path, *rows: dict[str, Any]) -> None:
    """As a run does: at the end of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def steps(*numbers: int, shift: float = 0.0) -> list[dict[str, Any]]:
    return [{"step": number, "tokens": 9, "train/loss": number + shift} for number in numbers]


def curve(events: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """What TensorBoard would draw."""
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_rows_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    assert lines.look() == (None, [])
    write(path, *steps(1, 2), {"step": 2, "eval/loss": 5.0})
    with path.open("a") as file:
        file.write('{"step": 3, "train/')
    assert [row["step"] for row in lines.look()[1]] == [1, 2, 2]
    assert lines.look() == (None, [])
    with path.open("a") as file:
        file.write('loss": 3.0}\n')
    assert lines.look() == (None, [{"step": 3, "train/loss": 3.0}])


def test_a_line_that_is_no_row_darkens_its_run_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told once."""
    dashboard = Dashboard(tmp_path / "runs", tmp_path / "events")
    write(tmp_path / "runs" / "good" / "metrics.jsonl", *steps(1))
    write(tmp_path / "runs" / "bad" / "metrics.jsonl", {"loss": 1.0})
    dashboard.look()
    dashboard.look()
    assert curve(tmp_path / "events" / "good") == [(1, 1.0)]
    assert capsys.readouterr().err.count("bad: a line that is no row") == 1


@pytest.mark.parametrize("cut", [0, 2, 4])
def test_a_run_that_goes_back_draws_one_curve(tmp_path: Path, cut: int) -> None:
    """Killed after step 4, resumed at the cut and further than before, between two looks."""
    metrics = tmp_path / "runs" / "one" / "metrics.jsonl"
    dashboard = Dashboard(tmp_path / "runs", tmp_path / "events")
    write(metrics, *steps(1, 2, 3, 4), {"step": 2, "eval/loss": 7.0})
    write(metrics.with_name("samples.jsonl"), {"step": 2, "text": "def f():\n  <b>"})
    dashboard.look()
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_rows(metrics.with_name(name), cut)
    write(metrics, *steps(*range(cut + 1, 7), shift=0.5))
    dashboard.look()
    write(metrics, *steps(7))
    dashboard.look()
    expected = [(step, step + (0.5 if step > cut else 0.0)) for step in range(1, 7)]
    assert curve(tmp_path / "events" / "one") == [*expected, (7, 7.0)]
    if cut >= 2:  # where the evaluation was
        assert curve(tmp_path / "events" / "one", "eval/loss") == [(2, 7.0)]


def test_a_run_that_starts_over_and_one_that_comes_later(tmp_path: Path) -> None:
    runs, events = tmp_path / "runs", tmp_path / "events"
    dashboard = Dashboard(runs, events)
    dashboard.look()
    write(runs / "one" / "metrics.jsonl", *steps(1, 2, 3))
    dashboard.look()
    (runs / "one" / "metrics.jsonl").unlink()  # run.resume=never sets it aside
    write(runs / "one" / "metrics.jsonl", *steps(1, 2, 3, shift=0.25))
    write(runs / "two" / "metrics.jsonl", *steps(1), {"step": 2, "train/loss": None})
    dashboard.look()
    assert curve(events / "one") == [(1, 1.25), (2, 2.25), (3, 3.25)]
    assert curve(events / "two") == [(1, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=x"], "unknown argument run=x; allowed are runs=DIR and port=N"),
        (["runs=/no/such"], "runs=/no/such is no folder"),
        (["runs=.", "port=0"], "port=0 is no port; choose 1 to 65535"),
        (["runs=.", "port=http"], "port=http is no port"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse(arguments)


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def start(runs: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tracking.dashboard", f"runs={runs}", f"port={port}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def scalars(address: str) -> list[list[float]]:
    """What the page asks the server for, `[time, step, value]` each."""
    url = f"{address}data/plugin/scalars/scalars?run=one&tag=train%2Floss"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return list(json.load(answer))


def follow(server: subprocess.Popen[str], metrics: Path, port: int) -> None:
    """What is written comes, what is taken back goes; the end is quiet."""
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://\S+/", line)
    assert found is not None, line
    assert line.startswith("1 runs of")
    write(metrics, *steps(2))
    deadline = time.monotonic() + PATIENCE_S
    drawn: list[list[float]] = []
    while len(drawn) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            drawn = scalars(found.group(0))
        except urllib.error.HTTPError:  # not loaded yet
            continue
    assert [point[1:] for point in drawn] == [[1, 1.0], [2, 2.0]]
    cut_rows(metrics, 1)
    while len(drawn) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
        drawn = scalars(found.group(0))
    assert [point[1:] for point in drawn] == [[1, 1.0]]
    second = start(metrics.parents[1], port)
    _, errors = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 2
    assert f"port={port}" in errors
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=PATIENCE_S)
    assert server.returncode == 0, errors
    assert "Traceback" not in errors


def test_it_serves_live_and_ends_quietly(tmp_path: Path, port: int) -> None:
    """A step written while it runs is there seconds later; a second one is told of the port."""
    metrics = tmp_path / "one" / "metrics.jsonl"
    write(metrics, *steps(1))
    server = start(tmp_path, port)
    try:
        follow(server, metrics, port)
    finally:
        server.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH")
def test_the_page_compares_runs(tmp_path: Path, port: int) -> None:
    """As a person sees it: both runs in the list, and a picture of each of their metrics."""
    for name, shift in (("dense", 0.0), ("parallel", 0.5)):
        rows = [row | {"speed/tokens_per_second": 100.0} for row in steps(1, 2, 3, shift=shift)]
        write(tmp_path / name / "metrics.jsonl", *rows, {"step": 3, "eval/bits_per_byte": 2.0})
    server = start(tmp_path, port)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        # Of one filter all cards are in view, and only what is in view is drawn.
        with browse(f"http://localhost:{port}/?tagFilter=loss|bits|tokens#timeseries") as page:
            for word in ("dense", "parallel", "/bits_per_byte", "/tokens_per_second", "/loss"):
                page.wait_for(f"document.body.innerText.includes('{word}')")
            page.wait_for("document.querySelectorAll('scalar-card canvas, scalar-card svg').length")
    finally:
        server.kill()
