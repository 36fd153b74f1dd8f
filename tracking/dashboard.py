"""Watch runs in a browser, without an account: `make dashboard ARGS="runs=DIR"`.

Follows `metrics.jsonl` and `samples.jsonl` of every run in a folder and hands what is new to a
TensorBoard on this machine. It only reads, so it can start and end at any time, also beside runs
under way and of another host that shares the folder.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from configs import ConfigError, exit_with_error
from tracking.live_rows import JsonLines

USAGE = """\
Usage: python -m tracking.dashboard [runs=DIR] [port=N]

Serves TensorBoard on localhost: losses, speed, memory, settings and samples of every run in a
folder, live. Ctrl-C ends it; runs do not notice.

  runs    the folder with the runs (a run's run.directory); default: runs
  port    default: 6006
"""
LOOK_EVERY_S = 2.0


def parse(arguments: list[str]) -> tuple[Path, int]:
    """The folder and the port. Raises ConfigError, naming key, value and what is allowed."""
    values = {"runs": "runs", "port": "6006"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in values:
            raise ConfigError(f"unknown argument {argument}; allowed are runs=DIR and port=N")
        values[key] = value
    if not Path(values["runs"]).is_dir():
        raise ConfigError(f"runs={values['runs']} is no folder; give the one that holds your runs")
    if not values["port"].isdecimal() or not 0 < int(values["port"]) < 2**16:
        raise ConfigError(f"port={values['port']} is no port; choose 1 to 65535")
    return Path(values["runs"]), int(values["port"])


class Follower:
    """What TensorBoard has of one run."""

    def __init__(self, run: Path, events: Path) -> None:
        self.run, self.events = run, events
        self.metrics, self.samples = (
            JsonLines(run / name) for name in ("metrics.jsonl", "samples.jsonl")
        )
        self._writer: Any = None

    def look(self) -> None:
        """Hand over what is new."""
        files = (self.metrics, self.samples)
        looks = [file.look() for file in files]
        cut_at = min((step for step, _ in looks if step is not None), default=None)
        rows = [new for _, new in looks]
        if cut_at is not None:  # of both files, as TensorBoard forgets all from there on
            rows = [
                [row for row in new if row["step"] < cut_at] + file.look_again_from(cut_at)
                for file, new in zip(files, rows, strict=True)
            ]
        if self._writer is None or cut_at is not None:
            self._open(cut_at)
        for row in rows[0]:
            for name, value in row.items():
                if "/" in name and value is not None:
                    self._writer.add_scalar(name, value, row["step"])
        for row in rows[1]:
            self._writer.add_text("sample", _verbatim(row["text"]), row["step"])
        self._writer.flush()

    def _open(self, cut_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - after the arguments

        if self._writer is not None:
            self._writer.close()
        # TensorBoard forgets from the step on with which it is told of a start, but for the first.
        self._writer = SummaryWriter(str(self.events), purge_step=cut_at or 0)
        config = self.run / "config.yaml"
        if cut_at is None and config.exists():
            self._writer.add_text("config", _verbatim(config.read_text("utf-8")), 0)


def _verbatim(text: str) -> str:
    """As Markdown that shows it letter by letter."""
    return "".join(f"    {line}\n" for line in text.splitlines())


class Dashboard:
    """All runs of a folder, also those that come later."""

    def __init__(self, runs: Path, events: Path) -> None:
        self.runs, self.events = runs, events
        self.followers: dict[Path, Follower] = {}
        self._problems: dict[Path, str] = {}

    def look(self) -> None:
        """Hand over what is new of each."""
        for metrics in sorted(self.runs.glob("*/metrics.jsonl")):
            run = metrics.parent
            if run not in self.followers:
                self.followers[run] = Follower(run, self.events / run.name)
            try:
                self.followers[run].look()
                self._problems.pop(run, None)
            except (OSError, ValueError, KeyError) as error:  # one run's file; the others go on
                if self._problems.get(run) != str(error):
                    self._problems[run] = str(error)
                    sys.stderr.write(f"{run}: {error}\n")


def serve(events: Path, port: int) -> str:
    """Start TensorBoard in this process; its address. Raises ConfigError if the port is taken."""
    from tensorboard import program  # noqa: PLC0415 - a second, after the arguments

    for name in ("tensorboard", "werkzeug"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = program.TensorBoard()
    flags = {
        "logdir": events,
        "host": "localhost",
        "port": port,
        "reload_interval": 2,
        "load_fast": "false",  # its other reader does not forget what a run has taken back
        "samples_per_plugin": "scalars=10000,text=100",
    }
    server.configure((None, *(f"--{name}={value}" for name, value in flags.items())))
    try:
        return str(server.launch())
    except program.TensorBoardServerException as error:
        raise ConfigError(f"port={port}: {error}; choose another port=N") from None


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C."""
    if {"--help", "-h", "help"} & set(arguments):
        sys.stdout.write(USAGE)
        return 0
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        runs, port = parse(arguments)
        with tempfile.TemporaryDirectory(prefix="microtron-dashboard-") as folder:
            dashboard = Dashboard(runs, Path(folder))
            dashboard.look()
            address = serve(Path(folder), port)
            sys.stdout.write(f"{len(dashboard.followers)} runs of {runs} at {address}; Ctrl-C\n")
            sys.stdout.flush()
            while not stop.wait(LOOK_EVERY_S):
                dashboard.look()
    except ConfigError as error:
        exit_with_error(f"config error: {error}")
    os._exit(0)  # the interpreter would wait for threads of TensorBoard's, who have nothing to save


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
