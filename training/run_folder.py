"""The folder of a run: its contents, its lock, and the record of how the run ended.

    runs/<run.name>/
        config.yaml  tokenizer.model or tokenizer.json  metrics.jsonl  samples.jsonl  exit.json
        checkpoints/  tensorboard/  wandb/
        .lock            see training/lock.py
        previous_1/ ...  what was there before run.resume=never

Opening the folder proves that all ranks share it. It can be moved, as no file in it holds an
absolute path. A launch that is refused before its first step changes nothing.

[Note: exit.json]
Rank 0 writes how the launch ended before it waits for anything else; during the last save it writes
that the launch has not ended yet. Any rank that crashes writes it too, because rank 0 may be
blocked in a collective. Errors that follow from the first one do not replace it.
"""

import contextlib
import itertools
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from checkpoints import checkpoint_directories, sweep_leftovers
from configs import (
    EXIT_BEFORE_TRAINING,
    Config,
    UserError,
    exit_with_error,
    flatten,
    machine_errors_as_user_errors,
    os_error_text,
    to_yaml,
)
from configs.errors import format_value
from configs.launch import launch_command
from configs.tokenizer_files import TOKENIZER_FILES
from parallel import Mesh, gather_json, lost_connection, wait_for_all_ranks
from training.lock import FolderLock

logger = logging.getLogger("microtron")

_PREVIOUS, _HANDSHAKE = "previous_", ".handshake-"
_OWN = ("checkpoints", "metrics.jsonl", "samples.jsonl", "profile", "tensorboard", "wandb", ".lock")
# Settings that may differ between hosts: paths, and what changes no number.
_HOST_KEYS = (
    *("data.path", "data.sources", "data.validation_path", "data.tokenizer", "logging."),
    *("data.cache_directory", "run.directory", "run.init_from", "train.num_threads"),
)
_WAIT_FOR_FILES_S = 10.0  # for a network file system to show on one host what another has made
_SAVING = "has not ended yet: saving step "


class FatalError(RuntimeError):
    """An error that all ranks raise together; it ends the run without a save."""

    exit_code: int


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Exit with one line, not a traceback, on a UserError, a FatalError or a lost connection."""
    try:
        yield
    except UserError as error:
        exit_with_error(str(error), may_be_alone=True)
    except FatalError as error:
        exit_with_error(str(error), error.exit_code)
    except RuntimeError as error:
        if (loss := lost_connection(error)) is None:
            raise
        exit_with_error("; ".join([loss, *getattr(error, "__notes__", [])]), 1, only_here=True)


def require_same_on_all_ranks(mesh: Mesh, value: str, what: str) -> None:
    """Raise UserError on every rank if ranks differ, as hosts may have other files or Pythons."""
    # One host may prepare its text for hours while another already has it.
    wait_for_all_ranks(mesh, what)
    reports = gather_json(mesh, [value, socket.gethostname()])
    (first, first_host), *_ = reports
    if others := [rank for rank, (other, _) in enumerate(reports) if other != first]:
        hosts = ", ".join(sorted({reports[rank][1] for rank in others}))
        raise UserError(
            f"{what} of ranks {others} on {hosts} differs from that of rank 0 on {first_host}; "
            "give all hosts the same files, and for data.source=python_stdlib the same Python"
        )


class RunFolder:
    """`runs/<run.name>`, locked inside a `with`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        assert config.run.name is not None, "load_config names every run"
        self.path = Path(config.run.directory, config.run.name)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.profile = self.path / "profile"
        self.step: int | None = None  # finished steps, for exit.json
        self.saved_step = 0  # of the newest checkpoint that this launch has loaded or saved
        self.exit_code: int | None = None  # once this rank knows how the launch ends
        self.starts_over = False  # run.resume=never: ignore what is there
        self._config, self._mesh = config, mesh
        self._launch_command = launch_command()  # before the launcher can die
        self._lock: FolderLock | None = None  # rank 0's
        self._is_writer = mesh.world.rank == 0
        self._exit = self.path / "exit.json"
        self._exit_before: object = None  # identifies the exit.json of an earlier launch
        self._has_begun = False

    def __enter__(self) -> "RunFolder":
        failure, nonce = None, uuid.uuid4().hex
        if self._is_writer:
            try:
                self._open(nonce)
            except OSError as error:
                failure = f"cannot write in run folder {self.path}: {os_error_text(error)}"
            except UserError as error:
                failure = str(error)
        # All ranks raise what rank 0 found, or they would wait for it in a collective.
        facts = (failure, nonce, self.starts_over)
        failure, nonce, self.starts_over = gather_json(self._mesh, facts)[0]
        failure = failure or self._sharing_problem(self.path / f"{_HANDSHAKE}{nonce}")
        failure = failure or self._settings_problem()
        if failure is not None:
            self._unlock()
            raise UserError(failure)
        self._exit_before = self._exit_file()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._record(error)
        if isinstance(error, RuntimeError) and lost_connection(error):
            error.add_note(f"{self._exit} has the command that resumes the run")
        self._unlock()

    def _open(self, nonce: str) -> None:
        """Lock the folder, remove what a killed run left, and create what all ranks must see."""
        for path in (self.path, *(self.path / name for name in _OWN)):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link to {path.readlink()}; a run only writes inside its "
                    "own folder: remove the link, or set run.directory to where the run should be"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path, is_restart=self._mesh.is_restart)
        self.starts_over = self._config.run.resume == "never" and not self._lock.continues_launch
        sweep_leftovers(self.checkpoints)
        for leftover in self.path.glob(f"{_HANDSHAKE}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.path / f"{_HANDSHAKE}{nonce}").mkdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _sharing_problem(self, handshake: Path) -> str | None:
        """Return the problem, on all ranks, if a rank does not see rank 0's new folder."""
        rank, host, sees, problem = self._mesh.world.rank, socket.gethostname(), True, None
        try:
            if rank > 0 and (sees := self._wait_for_folder(handshake)):
                (handshake / str(rank)).touch()
        except OSError as error:
            problem = f"rank {rank} on host {host} cannot write in {self.path}: "
            problem += os_error_text(error)
        report = [problem, sees, host, self._config.run.directory, str(self.path.absolute())]
        reports = gather_json(self._mesh, report)
        if rank == 0:
            shutil.rmtree(handshake, ignore_errors=True)
        unseen = [other for other, (_, sees, *_) in enumerate(reports) if not sees]
        if not unseen:
            return next((text for text, *_ in reports if text is not None), None)
        _, _, host, directory, path = reports[0]
        hosts = ", ".join(sorted({reports[other][2] for other in unseen}))
        return (
            f"run.directory={directory} is not shared by all ranks: ranks {unseen} on {hosts} do "
            f"not see the folder {path} that rank 0 created on {host}; set run.directory to a "
            "folder that all hosts share"
        )

    def _settings_problem(self) -> str | None:
        """Return the problem, on all ranks, if hosts were started with different settings."""
        settings = flatten(self._config).items()
        own = {key: value for key, value in settings if not key.startswith(_HOST_KEYS)}
        reports = gather_json(self._mesh, [socket.gethostname(), own])
        first = reports[0][1]
        for rank, (host, other) in enumerate(reports):
            key = next((key for key in first if other[key] != first[key]), None)
            if key is not None:
                return (
                    f"{key}={format_value(other[key])} on rank {rank} (host {host}), but "
                    f"{format_value(first[key])} on rank 0; start all hosts with the same settings"
                )
        return None

    def _wait_for_folder(self, folder: Path) -> bool:
        """Wait for a folder of rank 0; return whether it appears."""
        deadline = time.monotonic() + _WAIT_FOR_FILES_S
        while not (found := folder.is_dir()) and time.monotonic() < deadline:
            time.sleep(0.05)
            for parent in (self.path.parent, self.path):
                with contextlib.suppress(OSError):
                    os.listdir(parent)  # makes NFS forget that it found nothing
        return found

    def begin(self, tokenizer: Path) -> None:
        """Claim the folder for this launch; with run.resume=never, move an earlier run aside.

        Writes the configuration and the tokenizer, and removes the previous exit.json. After a
        rollback there is nothing left to do.
        """
        if self._has_begun:
            return
        self._has_begun = True
        if self._lock is not None:
            with machine_errors_as_user_errors(f"write in run folder {self.path}"):
                if self.starts_over:
                    self._set_aside()
                self._lock.write_lock_owner(has_begun=True)
                self._write("config.yaml", to_yaml(self._config).encode())
                self._write(tokenizer.name, tokenizer.read_bytes())
                for other in {*TOKENIZER_FILES} - {tokenizer.name}:  # of a launch without a save
                    (self.path / other).unlink(missing_ok=True)
            if not self._is_reported():
                self._exit.unlink(missing_ok=True)
        self.starts_over = False

    def _set_aside(self) -> None:
        """Move an earlier run of this name into a folder of its own."""
        entries = [
            path
            for path in self.path.iterdir()
            if path.name not in (".lock", "checkpoints") and not path.name.startswith(_PREVIOUS)
        ]
        if not entries and not any(self.checkpoints.iterdir()):
            return
        numbered = (self.path / f"{_PREVIOUS}{number}" for number in itertools.count(1))
        previous = next(path for path in numbered if not path.exists())
        previous.mkdir()
        for path in (*entries, self.checkpoints):
            path.rename(previous / path.name)
        self.checkpoints.mkdir()

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Write exit.json for an error before the contexts outside this one clean up."""
        try:
            yield
        except BaseException as error:
            self._record(error)
            raise

    def _record(self, error: BaseException | None) -> None:
        is_refusal = isinstance(error, UserError) and not self._has_begun
        if isinstance(error, FatalError):
            self.write_exit(error.exit_code, str(error))
        elif error is None or is_refusal or self._is_reported():
            return
        elif isinstance(error, SystemExit):
            self.write_exit(int(error.code or 0), "stopped before the first step")
        else:
            self.exit_code = EXIT_BEFORE_TRAINING if isinstance(error, UserError) else 1
            rank = f"rank {self._mesh.world.rank}: " if self._mesh.world.size > 1 else ""
            self._write_report(self.exit_code, f"{rank}{type(error).__name__}: {error}")

    def announce_last_save(self) -> None:
        """Record that the run is about to end, but has not yet."""
        if self._lock is not None:
            with self._reporting():
                self._lock.write_lock_owner(ending=True)
            self._write_report(1, f"{_SAVING}{self.step}")

    def write_exit(self, code: int, reason: str) -> None:
        """Write exit.json on rank 0. It keeps the code, which torchrun turns into 1."""
        self.exit_code = code
        if self._is_writer:
            self._write_report(code, reason)

    def write_hang(self, code: int, reason: str, *, speaks: bool) -> None:
        """Write exit.json if this rank `speaks` for the hung run; no later call replaces it."""
        self._is_writer = speaks
        self.write_exit(code, reason)
        self._is_writer = False

    def _write_report(self, code: int, reason: str) -> None:
        step = self.step
        if step is None:
            saved = [] if self.starts_over else checkpoint_directories(self.checkpoints)
            step = int(saved[-1].name.removeprefix("step_")) if saved else 0
        resume = None if (code, reason) == (0, "finished") else self.resume_command()
        report = {"code": code, "reason": reason, "step": step, "resume": resume}
        with self._reporting():
            self._write("exit.json", (json.dumps(report, indent=1) + "\n").encode())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Log an OSError, such as a full disk, instead of ending the launch with it."""
        try:
            yield
        except OSError as error:
            logger.warning("cannot write in %s: %s", self.path, os_error_text(error))

    def _is_reported(self) -> bool:
        """Whether some rank has written how this launch ended."""
        is_new = self._exit_file() not in (None, self._exit_before)
        return is_new and not json.loads(self._exit.read_bytes())["reason"].startswith(_SAVING)

    def _exit_file(self) -> object:
        """Identify the current exit.json; every report is a new file."""
        try:
            status = self._exit.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def resume_command(self, *settings: str) -> str:
        """The command line that continues this run; `settings` replace its own."""
        stop, resume = self._config.run.stop_at_step, self._config.run.resume
        if stop is not None and stop <= self.saved_step:
            settings = ("run.stop_at_step=null", *settings)  # the config file may have it too
        if resume == "must" or (resume == "never" and not self.starts_over):
            settings = ("run.resume=auto", *settings)
        replaced = {setting.partition("=")[0] for setting in settings}
        arguments = [arg for arg in sys.argv if arg.partition("=")[0] not in replaced]
        return f"{self._launch_command} {shlex.join([*arguments, *settings])}"

    def _write(self, name: str, content: bytes) -> None:
        """Replace a file atomically, even if several ranks do so at once."""
        temporary = self.path / f".{name}.tmp{self._mesh.world.rank}"
        try:
            temporary.write_bytes(content)
            temporary.rename(self.path / name)
        finally:
            temporary.unlink(missing_ok=True)  # there after a failure
