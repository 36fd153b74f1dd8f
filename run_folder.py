"""The folder of a run: one writer at a time, what it holds at the start, and how the run ended.

    runs/<run.name>/
        config.yaml  tokenizer.model  metrics.jsonl  checkpoints/  wandb/  exit.json
        .lock            held for life by rank 0; names its host and process
        previous_1/ ...  what was there before run.resume=never

All ranks must see the same file system. Nothing inside holds an absolute path, so it can be moved.
"""

import fcntl
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from checkpoints import sweep_leftovers
from configs import EXIT_BEFORE_TRAINING, Config, to_yaml
from parallel import Mesh, gather_json

_PREVIOUS = "previous_"
_WAIT_FOR_RUNNING_S, _WAIT_FOR_ENDING_S = 5.0, 30.0


class StartError(RuntimeError):
    """What keeps a run from starting and a person can mend: told in one line, no traceback."""


@contextmanager
def mendable(*kinds: type[Exception]) -> Iterator[None]:
    """Within it, errors of these kinds are messages for a person: raise them as StartError."""
    try:
        yield
    except kinds as error:
        raise StartError(str(error)) from error


class RunFolder:
    """`runs/<run.name>`, locked from the moment this is entered."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        assert config.run.name is not None, "load_config names every run"
        self.path = Path(config.run.directory, config.run.name)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tokenizer = self.path / "tokenizer.model"
        self._config, self._mesh = config, mesh
        self._is_writer = mesh.world.rank == 0
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunFolder":
        failure = None
        if self._is_writer:
            try:
                self._open()
            except OSError as error:
                failure = f"cannot write in run folder {self.path}: {error.strerror}"
            except StartError as error:
                failure = str(error)
        # Rank 0 alone knows; all raise, or its peers would wait for it in a collective.
        failure = gather_json(self._mesh, failure)[0]
        if failure is not None:
            raise StartError(failure)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, StartError):
            self.write_exit(EXIT_BEFORE_TRAINING, str(error), step=None)
        elif isinstance(error, SystemExit):
            self.write_exit(int(error.code or 0), "stopped before the first step", step=None)
        elif error is not None:
            self.write_exit(1, f"{type(error).__name__}: {error}", step=None)
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> None:
        """Lock the folder, clear what a killed run left, set aside what `never` must not resume."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        self.announce(ending=False)
        (self.path / "exit.json").unlink(missing_ok=True)
        if self._config.run.resume == "never":
            self._set_aside()
        sweep_leftovers(self.checkpoints)
        _write(self.path / "config.yaml", to_yaml(self._config))

    def _acquire(self) -> IO[str]:
        lock = (self.path / ".lock").open("a+")
        started_at = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = json.loads(lock.read() or "{}")
                # One that is ending (its launcher was killed, it is saving) is worth waiting for.
                patience = _WAIT_FOR_ENDING_S if holder.get("ending") else _WAIT_FOR_RUNNING_S
                if time.monotonic() - started_at > patience:
                    raise StartError(
                        f"run folder {self.path} is in use by process {holder.get('pid')} "
                        f"on {holder.get('host')} since {holder.get('since')}; wait for it, stop "
                        "it, or choose another run.name"
                    ) from None
                time.sleep(0.1)
            else:
                return lock

    def announce(self, *, ending: bool) -> None:
        """Say in the lock file who holds it, and whether it is about to let go."""
        if self._lock is None:
            return
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
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

    def keep_tokenizer(self, path: Path) -> None:
        """Copy the tokenizer into the folder, which must stand on its own."""
        if self._is_writer and not self.tokenizer.exists():
            temporary = self.tokenizer.with_suffix(".tmp")
            shutil.copyfile(path, temporary)
            temporary.rename(self.tokenizer)

    def write_exit(self, code: int, reason: str, step: int | None) -> None:
        """Leave exit.json: torchrun turns every code but 0 into 1, this file keeps it."""
        if self._is_writer:
            report = {"code": code, "reason": reason, "step": step, "resume": resume_command()}
            _write(self.path / "exit.json", json.dumps(report, indent=1) + "\n")


def resume_command() -> str:
    """The command line that goes on with this run."""
    program = shlex.join(arg for arg in sys.argv if not arg.startswith("run.resume="))
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_here is None:
        return f"python {program}"
    nodes = int(os.environ["WORLD_SIZE"]) // int(ranks_here)
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {ranks_here} {program}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.rename(path)
