"""A wandb run: how it is begun or taken up again, and which rows it has.

[Note: each step once]
A run that resumes does steps again whose rows wandb may have. metrics.jsonl is cut at the
checkpoint; wandb's history can't be cut, but it need not: the steps repeat themselves. So a launch
asks for the newest row that this wandb run has, of the server, or of the files of launches before
if it is offline, and sends what comes after it. That includes what got lost on its way, as
metrics.jsonl has it.

Steps do not repeat themselves where samples were passed over or a setting, the code or torch is
another. `curve_fingerprint` (training/state.py) is a hash of all that, and each row has it. If the
newest row has another one, rows after the checkpoint are sent again: their steps are twice in
the history, and the later row counts.
"""

import dataclasses
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from configs import Config, LoggingConfig
from model import num_parameters
from parallel import Mesh
from training.hardware import device_name
from training.state import begun_file

logger = logging.getLogger("microtron")

Row = dict[str, Any]

# The longest that wandb may take to begin a run, to end it, and for a question in between (a table
# has one). torchrun kills what has not ended 30 s after a signal, and wandb_view.py waits for the
# first, or for the other two, and the process once more at its exit.
BEGIN_TIMEOUT_S, END_TIMEOUT_S, _ANSWER_TIMEOUT_S = 15.0, 5.0, "10"
# Keys of settings whose values say where something is on this machine.
_PLACES = ("path", "validation_path", "directory", "cache_directory", "tokenizer")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run of ours as it begins or goes on."""

    wandb_id: str
    step: int  # finished steps: those of the checkpoint, at which metrics.jsonl was cut
    curve_fingerprint: str  # see the note
    about: Mapping[str, Any]


def about(config: Config, mesh: Mesh) -> Row:
    """What wandb keeps as the configuration of a run: nothing that names a machine or a person."""
    return {
        **_without_places(dataclasses.asdict(config)),
        "num_parameters": num_parameters(config.model, config.data.vocab_size),
        "layout": {
            "tp": mesh.tp.size,
            "dp": mesh.dp.size,
            "sp": mesh.sequence_parallel,
            "world": mesh.world.size,
        },
        "environment": {
            "device": device_name(mesh.device),
            "device_type": mesh.device.type,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
    }


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        # The name of a dataset is no path; a folder may be given in its place.
        is_name = value.get("source") == "hub" and not Path(str(value.get("path"))).is_dir()
        return {
            key: _without_places(inner)
            for key, inner in value.items()
            if key not in _PLACES or (key == "path" and is_name)
        }
    return [_without_places(item) for item in value] if isinstance(value, (list, tuple)) else value


def open_run(config: LoggingConfig, folder: Path, launch: Launch) -> Any:
    """The wandb run: online if there is a key and a server that answers, else offline."""
    # What wandb would report of its own errors has paths of this machine.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", _ANSWER_TIMEOUT_S)
    import wandb  # noqa: PLC0415 - half a second that `wandb=disabled` need not pay

    if config.wandb != "offline":
        if _has_key(wandb):
            try:
                run = _init(config, folder, launch, "online")
            except Exception as error:  # of whatever kind: offline needs no server
                logger.warning("wandb: %s; going on offline, `wandb sync` sends it", error)
                wandb.teardown()  # or its process takes the id for one in use
            else:
                logger.info("wandb: %s", run.url)
                return run
        elif config.wandb == "online":
            logger.warning("wandb: no API key; logging offline, `wandb sync` sends it later")
    return _init(config, folder, launch, "offline")


def _init(
    config: LoggingConfig, folder: Path, launch: Launch, mode: Literal["online", "offline"]
) -> Any:
    import wandb  # noqa: PLC0415 - as above

    settings = wandb.Settings(
        init_timeout=BEGIN_TIMEOUT_S,
        login_timeout=BEGIN_TIMEOUT_S,
        finish_timeout=END_TIMEOUT_S,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=1.0,  # what is lost if the machine dies; else 15 s
        # Nothing of the machine, its user or the command line leaves it.
        host="",
        program="",
        x_disable_meta=True,
        x_save_requirements=False,
        disable_git=True,
        disable_code=True,
        console="off",
        silent=True,
    )
    wandb.setup(settings=settings)  # for what is silent before there is a run
    run = wandb.init(
        project=config.wandb_project,
        dir=str(folder),
        id=launch.wandb_id,
        name=folder.name,
        resume="allow",
        mode=mode,
        settings=settings,
    )
    temporary = begun_file(folder).with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"id": launch.wandb_id, "curve_fingerprint": launch.curve_fingerprint})
    )
    temporary.rename(begun_file(folder))
    # The layout and much else may be another since.
    run.config.update(dict(launch.about), allow_val_change=True)
    # wandb's own step counts rows. Each row has tokens too, for who prefers that axis.
    run.define_metric("step")
    run.define_metric("curve_fingerprint", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def sent_before(run: Any, folder: Path, launch: Launch) -> int:
    """The step up to which this wandb run has rows that hold; see the note."""
    newest = _newest_row_in_files(run, folder, launch.wandb_id)
    if not run.offline and (run.summary.get("step") or 0) > newest["step"]:
        newest = {key: run.summary.get(key) for key in ("step", "curve_fingerprint")}
    step: int = newest["step"]
    return (
        step if newest["curve_fingerprint"] == launch.curve_fingerprint else min(step, launch.step)
    )


def _newest_row_in_files(run: Any, folder: Path, wandb_id: str) -> Row:
    """Of launches before: of all, or online of those that `wandb sync` has yet to send."""
    kind = "*" if run.offline else "offline-"
    logs = (folder / "wandb").glob(f"{kind}run-*-{wandb_id}*/run-{wandb_id}.wandb")
    for log in sorted(logs, key=lambda log: log.parent.name.removeprefix("offline-"), reverse=True):
        is_own = log.parent.name == Path(run.settings.sync_dir).name
        is_synced = log.with_name(f"{log.name}.synced").exists()
        if is_own or (is_synced and not run.offline):
            continue
        if row := _last_row(log):
            return row
    return {"step": 0, "curve_fingerprint": None}


def _last_row(log: Path) -> Row | None:
    """The last row that wandb can read, and so sync, of a file that a kill may have cut off."""
    command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(log)]
    last = None
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run
    ) as reader:
        assert reader.stdout is not None
        for line in reader.stdout:
            if '"type":"history"' in line:
                last = line
    return None if last is None else json.loads(last)["history"]["item"]


def _has_key(wandb: Any) -> bool:
    """Whether wandb could log in without asking: as it looks itself, in many places."""
    from wandb.sdk.lib import wbauth  # noqa: PLC0415 - as above

    host = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    try:
        found = wbauth.authenticate_session(
            host=host, source="train.py", prompt=False, update_session=False
        )
    except wandb.errors.AuthenticationError as error:  # a key that can be none
        logger.warning("wandb: %s", error)
        return False
    return found is not None
