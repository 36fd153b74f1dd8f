"""The lock of a run folder: one launch at a time writes there.

The kernel, or the server of a network file system, releases an flock when its holder dies.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from configs import UserError, launch_id

_WAIT_FOR_RUNNING_S, _WAIT_FOR_ENDING_S = 5.0, 30.0


class FolderLock:
    """The lock of a run folder, held from construction to `release`."""

    def __init__(self, folder: Path, *, is_restart: bool) -> None:
        """Wait briefly for the lock; raise UserError if another launch keeps it.

        `is_restart`: torchrun has restarted this launch, whose previous rank 0 may still be ending.
        """
        self._folder, self._path = folder, folder / ".lock"
        self._file = self._path.open("a+")
        self._wait_for_flock(is_restart)
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
        self.write_lock_owner(has_begun=self.continues_launch, ending=False)

    def write_lock_owner(self, **facts: bool) -> None:
        """Record who holds the lock, and the facts: has_begun (training) or ending."""
        self._owner |= facts
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(self._owner))
        self._file.flush()

    def release(self) -> None:
        """Let the next launch have the folder."""
        self._file.close()

    def _wait_for_flock(self, is_restart: bool) -> None:
        started_at = time.monotonic()
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self._read_owner()
                ends_soon = is_restart or owner.get("ending")
                patience_s = _WAIT_FOR_ENDING_S if ends_soon else _WAIT_FOR_RUNNING_S
                if time.monotonic() - started_at > patience_s:
                    raise UserError(
                        f"run folder {self._folder} is in use by process {owner.get('pid')} on "
                        f"{owner.get('host')} since {owner.get('since')}; wait for it, stop it, "
                        "or choose another run.name"
                    ) from None
                time.sleep(0.1)
            else:
                return

    def _read_owner(self) -> dict[str, Any]:
        """Who holds the lock or held it last; empty while that is being written."""
        try:
            owner: dict[str, Any] = json.loads(self._path.read_text())
        except json.JSONDecodeError:
            return {}
        return owner
