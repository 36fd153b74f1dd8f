"""The lock of a run folder: one launch at a time writes there.

Some file systems (Lustre with localflock) apply an flock within one host only. So the holder also
touches the file every few seconds and records its release there. If the last holder ran on another
host and recorded no release, a new launch first watches whether the file is still touched.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from configs import UserError, launch_id

logger = logging.getLogger("microtron")

_WAIT_FOR_RUNNING_S, _WAIT_FOR_ENDING_S = 5.0, 30.0
_HEARTBEAT_S, _WATCH_S = 3.0, 12.0  # how often a lock is touched, how long one is watched


class FolderLock:
    """The lock of a run folder, held from construction to `release`."""

    def __init__(self, folder: Path, *, is_restart: bool) -> None:
        """Wait briefly for the lock; raise UserError if another launch keeps it.

        `is_restart`: torchrun has restarted this launch, whose previous rank 0 may still be ending.
        """
        self._folder, self._path = folder, folder / ".lock"
        self._file = self._path.open("a+")
        self._released = threading.Event()
        self._wait_for_flock(is_restart)
        self._watch_other_host()
        previous = self._read_owner()
        # An earlier attempt of this launch has trained, so this one continues its work.
        self.continues_launch = is_restart and (
            previous.get("launch") == launch_id() and bool(previous.get("has_begun"))
        )
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "launch": launch_id(),
        }
        self.write_lock_owner(has_begun=self.continues_launch, ending=False, released=False)
        threading.Thread(target=self._touch, daemon=True).start()

    def write_lock_owner(self, **facts: bool) -> None:
        """Record who holds the lock, and the facts: has_begun (training), ending or released."""
        self._owner |= facts
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(self._owner))
        self._file.flush()

    def release(self) -> None:
        """Release the lock and record that."""
        self._released.set()
        # On a full disk closing still releases the lock; the next holder watches the file first.
        with contextlib.suppress(OSError), self._file:
            self.write_lock_owner(ending=True, released=True)

    def _wait_for_flock(self, is_restart: bool) -> None:
        started_at = time.monotonic()
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                ends_soon = is_restart or self._read_owner().get("ending")
                patience_s = _WAIT_FOR_ENDING_S if ends_soon else _WAIT_FOR_RUNNING_S
                if time.monotonic() - started_at > patience_s:
                    raise self._in_use() from None
                time.sleep(0.1)
            else:
                return

    def _watch_other_host(self) -> None:
        """Raise UserError if a holder on another host still touches the file."""
        owner = self._read_owner()
        if owner.get("released") or owner.get("host") in (None, socket.gethostname()):
            return
        logger.info("checking for %.0f s whether %s still runs", _WATCH_S, owner["host"])
        touched_at = self._touched_at()
        deadline = time.monotonic() + _WATCH_S
        while time.monotonic() < deadline:
            time.sleep(0.1)
            if self._touched_at() != touched_at:
                self._file.close()
                raise self._in_use()

    def _touched_at(self) -> int:
        with self._path.open() as file:  # opening makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns

    def _touch(self) -> None:
        while not self._released.wait(_HEARTBEAT_S):
            # A failing file system also fails the next save, with a clear message. ValueError: the
            # file was just closed.
            with contextlib.suppress(OSError, ValueError):
                os.utime(self._file.fileno())

    def _read_owner(self) -> dict[str, Any]:
        """Who holds the lock or held it last; empty while that is being written."""
        try:
            owner: dict[str, Any] = json.loads(self._path.read_text())
        except json.JSONDecodeError:
            return {}
        return owner

    def _in_use(self) -> UserError:
        owner = self._read_owner()
        return UserError(
            f"run folder {self._folder} is in use by process {owner.get('pid')} on "
            f"{owner.get('host')} since {owner.get('since')}; wait for it, stop it, or choose "
            "another run.name"
        )
