"""wandb as a view of metrics.jsonl, which can neither hold up nor end training.

A thread of rank 0 reads rows as they are written and sends them, all of a step as one, so that
training waits for nothing that wandb or its server does. Which rows: [Note: each step once] in
tracking/wandb_run.py.
"""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from checkpoints.manifest import checkpoint_directories
from configs import LoggingConfig
from tracking.wandb_run import END_TIMEOUT_S, Launch, Row, open_run, sent_before

logger = logging.getLogger("microtron")

_LOOK_EVERY_S = 0.5
_WAIT_S = 20.0  # the longest that training waits for it: at its end, where it may yet begin
_NUM_SAMPLES = 50  # the newest ones, in a table that is sent whole at each evaluation


class WandbView:
    """The wandb run of a run folder, from now until `finish`; none if wandb is disabled."""

    def __init__(self, config: LoggingConfig, folder: Path, launch: Launch) -> None:
        self.config, self.folder, self.launch = config, folder, launch
        self._ending, self._failed, self._given_up = threading.Event(), False, False
        self._sends_tables = True
        self._summary_sent: Row = {}
        self._thread: threading.Thread | None = None
        if config.wandb != "disabled":
            self._thread = threading.Thread(target=self._follow, name="wandb", daemon=True)
            self._thread.start()

    def finish(self, *, failed: bool) -> None:
        """Send the last rows and close the run, as far as that goes in time."""
        if self._thread is None:
            return
        self._failed = failed
        self._ending.set()
        self._thread.join(_WAIT_S)
        if self._thread.is_alive():
            self._given_up = True
            logger.warning("wandb: no end after %d s; metrics.jsonl has everything", _WAIT_S)

    def _follow(self) -> None:
        try:
            run = open_run(self.config, self.folder, self.launch)
            sent = sent_before(run, self.folder, self.launch)
            whole = _WholeRun()
            with (self.folder / "metrics.jsonl").open() as file:
                for row in self._steps(file):
                    whole.count(row)
                    if row["step"] > sent:
                        self._send(run, row)
                        self._summarise(run, whole.best)
            self._summarise(run, whole.best | whole.totals)
            self._close(run)
        except Exception as error:  # whatever a dashboard raises, training goes on
            if not self._given_up:
                logger.warning(
                    "wandb: %s: %s; metrics.jsonl has everything", type(error).__name__, error
                )

    def _steps(self, file: IO[str]) -> Iterator[Row]:
        """All that metrics.jsonl says of a step, once it is complete; ends with the run."""
        row: Row = {}
        is_last_look = False
        while not is_last_look:
            is_last_look = self._ending.wait(_LOOK_EVERY_S)
            for new in _whole_lines(file):
                if row and new["step"] != row["step"]:
                    yield row
                    row = {}
                row |= {key: value for key, value in new.items() if value is not None}
        if row:
            yield row

    def _send(self, run: Any, row: Row) -> None:
        row = {**row, "curve_fingerprint": self.launch.curve_fingerprint}
        if "eval/loss" in row and self._sends_tables and (table := self._table(row["step"])):
            try:
                run.log({**row, "samples": table})
            except Exception as error:  # a table alone needs an answer at once; rows can wait
                self._sends_tables = False
                logger.warning("wandb: %s; no more samples are sent in this launch", error)
            else:
                return
        run.log(row)

    def _table(self, step: int) -> Any:
        """The samples so far, if the newest one is of this step."""
        import wandb  # noqa: PLC0415 - see tracking/wandb_run.py

        path = self.folder / "samples.jsonl"
        if not path.exists():
            return None
        with path.open() as file:
            rows = list(_whole_lines(file))[-_NUM_SAMPLES:]
        if not rows or rows[-1]["step"] != step:
            return None
        return wandb.Table(["step", "text"], [[row["step"], row["text"]] for row in rows])

    def _summarise(self, run: Any, values: Row) -> None:
        """Set what is new of the summary, the newest checkpoint's name too."""
        saved = checkpoint_directories(self.folder / "checkpoints")
        values = values | ({"checkpoint": saved[-1].name} if saved else {})
        new = {key: value for key, value in values.items() if self._summary_sent.get(key) != value}
        if new:
            run.summary.update(new)
            self._summary_sent |= new

    def _close(self, run: Any) -> None:
        import wandb  # noqa: PLC0415 - see tracking/wandb_run.py

        try:
            run.finish(exit_code=int(self._failed))
        except TimeoutError:
            logger.warning(
                "wandb: the server has not taken everything in %d s; "
                "`wandb sync --include-online %s` sends it, or the run when it goes on",
                END_TIMEOUT_S,
                run.settings.sync_dir,
            )
        wandb.teardown()  # waits for its process, which has yet to write its last records


class _WholeRun:
    """What rows say of the run as a whole.

    wandb's own minima are of one launch alone.
    """

    def __init__(self) -> None:
        self.best: Row = {}
        self.totals: Row = {"total/steps": 0, "total/tokens": 0, "total/training_hours": 0.0}

    def count(self, row: Row) -> None:
        """The row of the next step."""
        if speed := row.get("speed/tokens_per_second"):
            seconds = (row["tokens"] - self.totals["total/tokens"]) / speed
            self.totals["total/training_hours"] += seconds / 3600
        self.totals |= {"total/steps": row["step"], "total/tokens": row.get("tokens", 0)}
        loss = row.get("eval/loss")
        if loss is not None and loss < self.best.get("best/eval_loss", float("inf")):
            self.best = {"best/eval_loss": loss, "best/step": row["step"]}


def _whole_lines(file: IO[str]) -> Iterator[Row]:
    """The rows that are new; a line that is still being written is left for the next time."""
    while True:
        before = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(before)
            return
        yield json.loads(line)
