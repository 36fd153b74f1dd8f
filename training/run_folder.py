"""The folder of a run: one writer at a time, what it holds at the start, and how the run ended.

    runs/<run.name>/
        config.yaml  tokenizer.model  metrics.jsonl  samples.jsonl  checkpoints/  wandb/  exit.json
        .lock            held for life by rank 0; names its host and process [Note: lock]
        previous_1/ ...  what was there before run.resume=never

All ranks must see the same folder, which is proven when it is opened. Nothing inside holds an
absolute path, so it can be moved. A launch that is refused before its first step changes nothing.

[Note: exit.json]
Rank 0 writes how the launch ended, before it waits for anything else, and while the last save runs,
that it has not ended yet. Any rank that crashes writes it too, as rank 0 may be blocked in a
collective; errors that follow from the first one do not replace it.

[Note: lock]
The kernel releases an flock when its holder dies, but some file systems (Lustre with localflock)
keep it on one host. So the holder also touches the file every few seconds, and writes in it that it
lets go. A launch that gets the lock of a holder on another host which never did watches it first.
"""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from checkpoints import checkpoint_directories, sweep_leftovers
from configs import (
    EXIT_BEFORE_TRAINING,
    Config,
    UserError,
    launch_id,
    machine_errors_as_user_errors,
    os_error_text,
    to_yaml,
)
from parallel import Mesh, gather_json, wait_for_all_ranks
from training.stopping import FatalError

logger = logging.getLogger("microtron")

_PREVIOUS, _HANDSHAKE = "previous_", ".handshake-"
_WAIT_FOR_RUNNING_S, _WAIT_FOR_ENDING_S = 5.0, 30.0
_WAIT_FOR_FILES_S = 10.0  # for a network file system to show on one host what another has made
_HEARTBEAT_S, _WATCH_S = 3.0, 12.0  # how often a lock is touched, how long one is watched
_SAVING = "has not ended yet: saving step "


def require_same_on_all_ranks(mesh: Mesh, value: str, what: str) -> None:
    """Raise UserError on every rank if ranks differ: hosts may have other files or Pythons."""
    # Preparing the text may take hours on one host and nothing on another that has it already.
    wait_for_all_ranks(mesh, what)
    values = gather_json(mesh, value)
    if len(set(values)) > 1:
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        raise UserError(
            f"{what} of ranks {others} differs from that of rank 0; give all hosts the same "
            "files, and for data.source=python_stdlib the same Python"
        )


def _fresh_mtime(path: Path) -> int:
    """When a file was touched, in ns; opening it has NFS ask the server."""
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns


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
        self._lets_go = threading.Event()
        self._exit = self.path / "exit.json"
        self._exit_before: object = None  # which file it was when this launch began
        self._has_begun = False
        self.starts_over = False  # whether what is there is not to be resumed

    def __enter__(self) -> "RunFolder":
        failure, nonce = None, uuid.uuid4().hex
        if self._is_writer:
            try:
                self._open(nonce)
            except OSError as error:
                failure = f"cannot write in run folder {self.path}: {os_error_text(error)}"
            except UserError as error:
                failure = str(error)
        # Rank 0 alone knows; all raise, or its peers would wait for it in a collective.
        facts = (failure, nonce, self.starts_over)
        failure, nonce, self.starts_over = gather_json(self._mesh, facts)[0]
        failure = failure or self._why_not_shared(self.path / f"{_HANDSHAKE}{nonce}")
        if failure is not None:
            self._unlock()
            raise UserError(failure)
        self._exit_before = self._exit_file()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._record(error)
        self._unlock()

    def _open(self, nonce: str) -> None:
        """Lock the folder, clear what a killed run left, and make what all ranks must see."""
        self._refuse_links()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = self._acquire()
        # Read before it is ours: an attempt that torchrun has started again goes on with what the
        # attempts before it have done, whatever the first one was told.
        holder = self._holder()
        is_ours = holder.get("launch") == launch_id() and holder.get("has_begun")
        goes_on = self._mesh.is_restart and is_ours
        self.starts_over = self._config.run.resume == "never" and not goes_on
        self.announce(ending=False)
        threading.Thread(target=self._touch_lock, args=(self._lock,), daemon=True).start()
        sweep_leftovers(self.checkpoints)
        for leftover in self.path.glob(f"{_HANDSHAKE}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        (self.path / f"{_HANDSHAKE}{nonce}").mkdir()

    def _unlock(self) -> None:
        self._lets_go.set()
        if self._lock is not None:
            # On a full disk: the kernel lets go all the same, and the next holder watches first.
            with contextlib.suppress(OSError):
                self.announce(ending=True, released=True)
            with contextlib.suppress(OSError):
                self._lock.close()
            self._lock = None

    def _touch_lock(self, lock: IO[str]) -> None:
        """The heartbeat of the holder, in a thread of its own."""
        while not self._lets_go.wait(_HEARTBEAT_S):
            # An error here is the file system's, which fails the next save with a clear message;
            # ValueError: the file has just been closed.
            with contextlib.suppress(OSError, ValueError):
                os.utime(lock.fileno())

    def _why_not_shared(self, handshake: Path) -> str | None:
        """Have every rank write where rank 0 reads: None if that works, on every rank the same.

        `handshake` is a new folder that rank 0 has made.
        """
        rank, host = self._mesh.world.rank, socket.gethostname()
        refusal = None
        try:
            if rank > 0 and self._comes_to_light(handshake.is_dir):
                (handshake / f"rank_{rank:05d}").touch()
        except OSError as error:
            refusal = f"rank {rank} on host {host} cannot write in {self.path}: "
            refusal += os_error_text(error)
        reports = gather_json(self._mesh, [host, refusal])
        if rank > 0:
            verdict: str | None = gather_json(self._mesh, None)[0]
            return verdict
        files = {other: handshake / f"rank_{other:05d}" for other in range(1, len(reports))}
        self._comes_to_light(lambda: all(path.exists() for path in files.values()))
        unseen = [other for other, path in files.items() if not path.exists()]
        verdict = next((text for _, text in reports if text is not None), None)
        if unseen and verdict is None:
            hosts = ", ".join(sorted({reports[other][0] for other in unseen}))
            verdict = (
                f"run.directory={self._config.run.directory} is not shared by all ranks: ranks "
                f"{unseen} on {hosts} do not see the folder {self.path.absolute()} that rank 0 has "
                f"made on {host}; set run.directory to a folder that all hosts share"
            )
        shutil.rmtree(handshake, ignore_errors=True)
        gather_json(self._mesh, verdict)
        return verdict

    def _comes_to_light(self, is_there: Callable[[], bool]) -> bool:
        """Wait a while for something that another rank has made; returns whether it is there."""
        deadline = time.monotonic() + _WAIT_FOR_FILES_S
        while not (found := is_there()) and time.monotonic() < deadline:
            time.sleep(0.05)
            for folder in (self.path.parent, self.path):
                with contextlib.suppress(OSError):
                    os.listdir(folder)  # has NFS look again, where it remembers that nothing is
        return found

    def _refuse_links(self) -> None:
        """What a run writes and deletes lies in its folder, not where somebody's link leads."""
        names = ("checkpoints", "metrics.jsonl", "samples.jsonl", "profile", "wandb", ".lock")
        for path in (self.path, self.path / "tensorboard", *(self.path / name for name in names)):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link to {path.readlink()}; a run writes to its own "
                    "folder alone: remove the link, or set run.directory to where the run should be"
                )

    def _acquire(self) -> IO[str]:
        path = self.path / ".lock"
        lock = path.open("a+")
        started_at = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                # One that is ending (its launcher was killed, it is saving) is worth waiting for,
                # and so is the rank 0 of the attempt before this one.
                is_ending = holder.get("ending") or self._mesh.is_restart
                patience = _WAIT_FOR_ENDING_S if is_ending else _WAIT_FOR_RUNNING_S
                if time.monotonic() - started_at > patience:
                    raise self._in_use(holder) from None
                time.sleep(0.1)
            else:
                break
        holder = self._holder()
        if not holder.get("released") and holder.get("host") not in (None, socket.gethostname()):
            logger.info("checking for %.0f s whether %s still runs", _WATCH_S, holder["host"])
            touched_at = _fresh_mtime(path)
            deadline = time.monotonic() + _WATCH_S
            while time.monotonic() < deadline:
                time.sleep(0.1)
                if _fresh_mtime(path) != touched_at:
                    lock.close()
                    raise self._in_use(self._holder())
        return lock

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"run folder {self.path} is in use by process {holder.get('pid')} on "
            f"{holder.get('host')} since {holder.get('since')}; wait for it, stop it, or choose "
            "another run.name"
        )

    def _holder(self) -> dict[str, Any]:
        """Who holds the lock, or held it last; empty while that is being written."""
        try:
            holder: dict[str, Any] = json.loads((self.path / ".lock").read_text())
        except json.JSONDecodeError:
            return {}
        return holder

    def announce(self, *, ending: bool, released: bool = False) -> None:
        """Say in the lock file who holds it, and whether it is about to let go or has done so."""
        if self._lock is None:
            return
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._since,
            "launch": launch_id(),
            "has_begun": self._has_begun,
            "ending": ending,
            "released": released,
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

    def begin(self, tokenizer: Path) -> None:
        """Nothing refuses this launch any more: from here on the folder is that of its run.

        Sets aside what `never` must not resume, leaves the configuration and the tokenizer, and
        removes the exit.json of the launch before.
        """
        self._has_begun = True
        if self._is_writer:
            with machine_errors_as_user_errors(f"write in run folder {self.path}"):
                if self.starts_over:
                    self._set_aside()
                self.announce(ending=False)
                self._write("config.yaml", to_yaml(self._config).encode())
                self._write("tokenizer.model", tokenizer.read_bytes())
            if not self._is_reported():
                self._exit.unlink(missing_ok=True)
        self.starts_over = False  # a rollback comes here again

    @contextlib.contextmanager
    def recording_failure(self) -> Iterator[None]:
        """Write exit.json for an error as it passes, before what it passes next takes its time."""
        try:
            yield
        except BaseException as error:
            self._record(error)
            raise

    def _record(self, error: BaseException | None) -> None:
        if isinstance(error, FatalError):
            self.write_exit(error.exit_code, str(error))
        elif isinstance(error, UserError) and not self._has_begun:
            pass  # refused
        elif error is not None and not self._is_reported():
            if isinstance(error, SystemExit):
                self.write_exit(int(error.code or 0), "stopped before the first step")
            else:
                code = EXIT_BEFORE_TRAINING if isinstance(error, UserError) else 1
                rank = f"rank {self._mesh.world.rank}: " if self._mesh.world.size > 1 else ""
                self._write_report(code, f"{rank}{type(error).__name__}: {error}")

    def announce_last_save(self) -> None:
        """Say that the run is about to end, but has not."""
        with self._reporting():
            self.announce(ending=True)
        self.write_exit(1, f"{_SAVING}{self.step}")

    def write_exit(self, code: int, reason: str) -> None:
        """Leave exit.json, on rank 0; torchrun turns every code but 0 into 1, this keeps it."""
        if self._is_writer:
            self._write_report(code, reason)

    def _write_report(self, code: int, reason: str) -> None:
        step = self.step
        if step is None:
            saved = checkpoint_directories(self.checkpoints)
            step = int(saved[-1].name.removeprefix("step_")) if saved else 0
        finished = code == 0 and step >= self._config.train.train_steps
        resume = None if finished else self.resume_command()
        report = {"code": code, "reason": reason, "step": step, "resume": resume}
        with self._reporting():
            self._write("exit.json", (json.dumps(report, indent=1) + "\n").encode())

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """On a full disk the launch must end as reported, not by failing to report."""
        try:
            yield
        except OSError as error:
            logger.warning("cannot write in %s: %s", self.path, os_error_text(error))

    def _is_reported(self) -> bool:
        """Whether some rank has said how this launch ends."""
        is_new = self._exit_file() not in (None, self._exit_before)
        return is_new and not json.loads(self._exit.read_bytes())["reason"].startswith(_SAVING)

    def _exit_file(self) -> object:
        """Which file exit.json is: every report is a new one."""
        try:
            status = self._exit.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

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

    def _write(self, name: str, content: bytes) -> None:
        """Replace a file at once; several ranks may do that at the same time."""
        temporary = self.path / f".{name}.tmp{self._mesh.world.rank}"
        temporary.write_bytes(content)
        temporary.rename(self.path / name)


def _launcher() -> str:
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_here is None:
        return "python"
    nodes = int(os.environ["WORLD_SIZE"]) // int(ranks_here)
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {ranks_here}"
