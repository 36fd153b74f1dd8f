"""The folder of a run: one writer at a time, what it holds at the start, and how the run ended.

    runs/<run.name>/
        config.yaml  tokenizer.model  metrics.jsonl  samples.jsonl  checkpoints/  wandb/  exit.json
        .lock            held for life by rank 0; names its host and process
        previous_1/ ...  what was there before run.resume=never

All ranks must see the same file system. Nothing inside holds an absolute path, so it can be moved.
"""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

from checkpoints import sweep_leftovers
from configs import (
    EXIT_BEFORE_TRAINING,
    Config,
    UserError,
    is_restart,
    launch_id,
    os_error_text,
    to_yaml,
)
from parallel import Mesh, gather_json
from stopping import FatalError

_PREVIOUS = "previous_"
_WAIT_FOR_RUNNING_S, _WAIT_FOR_ENDING_S = 5.0, 30.0


def require_same_on_all_ranks(mesh: Mesh, value: str, what: str) -> None:
    """Raise UserError on every rank if ranks differ: hosts may have other files or Pythons."""
    values = gather_json(mesh, value)
    if len(set(values)) > 1:
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        raise UserError(
            f"{what} of ranks {others} differs from that of rank 0; give all hosts the same "
            "files, and for data.source=python_stdlib the same Python"
        )


class RunFolder:
    """`runs/<run.name>`, locked from the moment this is entered."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        assert config.run.name is not None, "load_config names every run"
        self.path = Path(config.run.directory, config.run.name)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.profile = self.path / "profile"
        self.tokenizer = self.path / "tokenizer.model"
        self.step: int | None = None  # finished updates, for exit.json
        self.opened_at = time.monotonic()
        self._config, self._mesh = config, mesh
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._is_writer = mesh.world.rank == 0
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunFolder":
        failure = None
        if self._is_writer:
            try:
                self._open()
            except OSError as error:
                failure = f"cannot write in run folder {self.path}: {os_error_text(error)}"
            except UserError as error:
                failure = str(error)
        # Rank 0 alone knows; all raise, or its peers would wait for it in a collective.
        failure = gather_json(self._mesh, failure)[0]
        if failure is not None:
            raise UserError(failure)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError):
            self.write_exit(EXIT_BEFORE_TRAINING, str(error))
        elif isinstance(error, FatalError):
            self.write_exit(error.exit_code, str(error))
        elif isinstance(error, SystemExit):
            self.write_exit(int(error.code or 0), "stopped before the first step")
        elif error is not None and not (self.path / "exit.json").exists():
            # If it exists, the other ranks have given this one up, and said why.
            self.write_exit(1, f"{type(error).__name__}: {error}")
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> None:
        """Lock the folder, clear what a killed run left, set aside what `never` must not resume."""
        self._refuse_links()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        # Read before it is ours: an attempt that torchrun has started again goes on with what the
        # attempts before it have done, whatever the first one was told.
        goes_on = is_restart() and self._holder().get("launch") == launch_id()
        self.announce(ending=False)
        if self._config.run.resume == "never" and not goes_on:
            self._set_aside()
        (self.path / "exit.json").unlink(missing_ok=True)
        sweep_leftovers(self.checkpoints)

    def _refuse_links(self) -> None:
        """What a run writes and deletes lies in its folder, not where somebody's link leads."""
        names = ("checkpoints", "metrics.jsonl", "samples.jsonl", "profile", "wandb", ".lock")
        for path in (self.path, *(self.path / name for name in names)):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link to {path.readlink()}; a run writes to its own "
                    "folder alone: remove the link, or set run.directory to where the run should be"
                )

    def _acquire(self) -> IO[str]:
        lock = (self.path / ".lock").open("a+")
        started_at = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                # One that is ending (its launcher was killed, it is saving) is worth waiting for,
                # and so is the rank 0 of the attempt before this one.
                is_ending = holder.get("ending") or is_restart()
                patience = _WAIT_FOR_ENDING_S if is_ending else _WAIT_FOR_RUNNING_S
                if time.monotonic() - started_at > patience:
                    raise UserError(
                        f"run folder {self.path} is in use by process {holder.get('pid')} "
                        f"on {holder.get('host')} since {holder.get('since')}; wait for it, stop "
                        "it, or choose another run.name"
                    ) from None
                time.sleep(0.1)
            else:
                return lock

    def _holder(self) -> dict[str, Any]:
        """Who holds the lock, or held it last; empty while that is being written."""
        try:
            holder: dict[str, Any] = json.loads((self.path / ".lock").read_text())
        except json.JSONDecodeError:
            return {}
        return holder

    def announce(self, *, ending: bool) -> None:
        """Say in the lock file who holds it, and whether it is about to let go."""
        if self._lock is None:
            return
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "launch": launch_id(),
            "ending": ending,
        }
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(json.dumps(holder))
        self._lock.flush()

    def _set_aside(self) -> None:
        """Move an earlier run of this name into a folder of its own: `never` loses nothing."""
        kept = (".lock", "checkpoints")
        entries = [
            path
            for path in self.path.iterdir()
            if path.name not in kept and not path.name.startswith(_PREVIOUS)
        ]
        if not entries and not any(self.checkpoints.iterdir()):
            return
        number = 1
        while (previous := self.path / f"{_PREVIOUS}{number}").exists():
            number += 1
        previous.mkdir()
        for path in (*entries, self.checkpoints):
            path.rename(previous / path.name)
        self.checkpoints.mkdir()

    def describe(self, tokenizer: Path) -> None:
        """Leave the configuration and the tokenizer of the run that now begins or goes on."""
        if self._is_writer:
            _write(self.path / "config.yaml", to_yaml(self._config).encode())
            _write(self.tokenizer, tokenizer.read_bytes())

    def write_exit(self, code: int, reason: str) -> None:
        """Leave exit.json: torchrun turns every code but 0 into 1, this file keeps it."""
        if self._is_writer:
            finished = self.step is not None and self.step >= self._config.train.train_steps
            report = {
                "code": code,
                "reason": reason,
                "step": self.step,
                "resume": None if code == 0 and finished else self.resume_command(),
            }
            _write(self.path / "exit.json", (json.dumps(report, indent=1) + "\n").encode())

    def write_hang(self, code: int, reason: str, *, speaks: bool) -> None:
        """As `write_exit`, by whichever rank can still speak; what comes after changes nothing."""
        self._is_writer = speaks
        self.write_exit(code, reason)
        self._is_writer = False

    def resume_command(self, *settings: str) -> str:
        """The command line that goes on with this run; `settings` replace those that it has."""
        dropped = {"run.resume", *(setting.partition("=")[0] for setting in settings)}
        if self.step == self._config.run.stop_at_step:
            dropped.add("run.stop_at_step")
        arguments = [arg for arg in sys.argv if arg.partition("=")[0] not in dropped]
        if self._config.run.resume == "never":
            arguments.append("run.resume=auto")
        return f"{_launcher()} {shlex.join([*arguments, *settings])}"


def _launcher() -> str:
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_here is None:
        return "python"
    nodes = int(os.environ["WORLD_SIZE"]) // int(ranks_here)
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {ranks_here}"


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.rename(path)
