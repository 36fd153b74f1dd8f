"""Forward metrics and samples to wandb (Weights & Biases) without delaying or stopping training.

Training puts rows in a queue; a thread of rank 0 sends them. All launches of a run share one wandb
run, and every metric is plotted against `step`. Steps repeated after a crash or a rollback are sent
again, and the later row counts.
"""

import contextlib
import dataclasses
import html
import logging
import os
import queue
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from configs import Config, LoggingConfig
from model import num_parameters
from parallel import Mesh
from training.hardware import device_name
from training.state import recorded_wandb_id, wandb_id_file

logger = logging.getLogger("microtron")

_MAX_ROWS = 10_000  # in the queue
# torchrun kills a process 30 s after a signal, and wandb may need some seconds at process exit.
INIT_TIMEOUT_S, FINISH_TIMEOUT_S, MAX_WAIT_S = 15.0, 5.0, 20.0
# Settings that may contain local paths, which are not sent.
_PATHS = (
    *("path", "validation_path", "directory", "cache_directory", "tokenizer", "init_from"),
    "tasks",
)


class WandbForwarder:
    """The wandb run of a run folder until `finish`; does nothing if wandb is disabled."""

    def __init__(self, config: LoggingConfig, folder: Path, wandb_id: str, sent: Any) -> None:
        self._config, self._folder, self._sent_config = config, folder, sent
        self._id, self._failed = recorded_wandb_id(folder) or wandb_id, False
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_ROWS)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        if config.wandb != "disabled":
            self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Forward a row with metrics or a sample."""
        if not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            if self._num_dropped == 0:
                logger.warning("wandb: %d rows are waiting; dropping new rows", _MAX_ROWS)
            self._num_dropped += 1

    def finish(self, *, failed: bool) -> None:
        """Send what is left and close the wandb run; give up after MAX_WAIT_S."""
        self._failed = failed
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # the thread is stuck; give up after the join
                self._rows.put_nowait(None)
            self._thread.join(MAX_WAIT_S)
        if self._thread.is_alive():
            logger.warning("wandb: not finished after %d s; exiting without it", MAX_WAIT_S)

    def _run(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports contain local paths
        import wandb  # noqa: PLC0415 - half a second that `logging.wandb=disabled` saves

        try:
            run = self._start(wandb)
            while (row := self._rows.get()) is not None:
                if "sample" in row:  # not a wandb.Table, for which `log` waits for the server
                    text = f"<pre>{html.escape(row['sample'])}</pre>"
                    row["sample"] = wandb.Html(text, inject=False, data_is_not_path=True)
                run.log(row)
            run.finish(exit_code=int(self._failed))
        except Exception as error:  # whatever wandb raises, training continues
            command = f"wandb sync --include-online {self._folder / 'wandb'}"
            logger.warning("wandb: %r; `%s` uploads what is missing", error, command)
        finally:
            wandb.teardown()  # waits until its process has written the last records

    def _start(self, wandb: Any, *, is_new: bool = False) -> Any:
        """Return the wandb run: online if there is a key and the server answers, else offline."""
        mode = self._config.wandb
        try:
            if mode != "offline" and _has_key(wandb):
                return self._init(wandb, "online")
            if mode == "online":
                raise wandb.errors.UsageError("no API key")
        except Exception as error:  # of any kind: offline needs no server
            wandb.teardown()  # or its process reports that the id is in use
            if "HTTP 409" in str(error) and not is_new:
                logger.warning("wandb: run id %s is rejected (deleted?); using a new one", self._id)
                self._id = uuid.uuid4().hex[:12]
                return self._start(wandb, is_new=True)
            logger.warning("wandb: %s; logging offline, upload with `wandb sync`", error)
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        wandb_id_file(self._folder).parent.mkdir(exist_ok=True)
        wandb_id_file(self._folder).write_text(self._id)
        # Nothing about the machine, its user or the command line is sent.
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # seconds that a machine crash loses
            host="",
            program="",
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
        )
        run = wandb.init(
            project=self._config.wandb_project,
            dir=str(self._folder),
            id=self._id,
            name=self._folder.name,
            resume="allow",
            mode=mode,
            settings=settings,
        )
        if mode == "online":
            logger.info("wandb: %s", run.url)
        run.config.update(self._sent_config, allow_val_change=True)  # a resume may change settings
        run.define_metric("*", step_metric="step")
        for metric in ("eval/loss", "eval/bits_per_byte"):
            run.define_metric(metric, step_metric="step", summary="min")
        return run


def wandb_config(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the resolved settings, model size, layout and environment, without local paths."""
    return {
        **_without_paths(dataclasses.asdict(config)),
        "num_parameters": num_parameters(config.model, config.data.padded_vocab_size),
        "layout": {axis: getattr(mesh, axis).size for axis in ("pp", "dp", "cp", "tp", "world")},
        "environment": {"device": device_name(mesh.device), "torch": torch.__version__},
    }


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items() if key not in _PATHS}
    return [_without_paths(item) for item in value] if isinstance(value, (list, tuple)) else value


def _has_key(wandb: Any) -> bool:
    """Return whether wandb finds a key for its server; without one `wandb.init` would prompt."""
    from wandb.sdk.lib import wbauth  # noqa: PLC0415 - with wandb itself

    host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    return wbauth.authenticate_session(host=host, source="train.py", prompt=False) is not None
