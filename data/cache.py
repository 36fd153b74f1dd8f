"""Folders that appear whole or not at all.

A folder is filled under a temporary name, with everything in it on the disk, and appears by one
rename. Its header tells the size of each file, so that damage is noticed. Who fills it holds a file
lock, which the kernel releases when the process dies; two runs that share the cache wait for each
other there.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.token_file import write_durably

_HEADER = "header.json"
_POLL_INTERVAL_S = 0.2
_WAIT_LOG_INTERVAL_S = 60.0

logger = logging.getLogger("microtron")


def write_header(entry: Path, names: list[str], facts: dict[str, Any]) -> None:
    """Writes the header, which must be the last file: facts, and the sizes of the named files."""
    sizes = {name: (entry / name).stat().st_size for name in names}
    write_durably(entry / _HEADER, json.dumps({**facts, "files": sizes}, indent=1).encode())
    _sync_directory(entry)


def read_header(entry: Path) -> dict[str, Any]:
    """Returns the facts of an entry."""
    header: dict[str, Any] = json.loads((entry / _HEADER).read_text())
    return header


def is_whole(entry: Path) -> bool:
    """True if the header is there and every file has the size it tells."""
    try:
        sizes = read_header(entry)["files"]
        return all((entry / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def build_entry(entry: Path, fill: Callable[[Path], None]) -> None:
    """Makes the entry by `fill(temporary folder)`, unless another run has meanwhile made it."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_name(f"{entry.name}.lock")):
        # Only the holder of the lock makes such folders, so these are left by runs that died.
        for leftover in entry.parent.glob(f"{entry.name}.tmp-*"):
            shutil.rmtree(leftover)
        if is_whole(entry):
            return
        work = Path(tempfile.mkdtemp(prefix=f"{entry.name}.tmp-", dir=entry.parent))
        try:
            fill(work)
            if entry.exists():
                shutil.rmtree(entry)
            work.rename(entry)
            _sync_directory(entry.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def wait_for_entry(entry: Path) -> None:
    """Returns when the entry is there; if whoever makes it fails, the launcher ends this rank."""
    logged_at = time.perf_counter()
    while not is_whole(entry):
        time.sleep(_POLL_INTERVAL_S)
        if time.perf_counter() - logged_at > _WAIT_LOG_INTERVAL_S:
            logged_at = time.perf_counter()
            logger.info("waiting for local rank 0 to prepare %s", entry)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that prepares the same corpus (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
