"""Folders that appear whole or not at all, and can be gone on with after a kill.

A folder is filled under a temporary name, with everything in it on the disk, and appears by one
rename. Its header tells the size of each file, so that damage is noticed. Who fills it holds a file
lock, which the kernel releases when the process dies; what a killed process has filled stays, and
the next one goes on from there.
"""

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.durable import sync_directory, write_durably

TEXT = "text-"  # what the names of folders begin with that are of use only to make others
_HEADER = "header.json"
_PARTIAL = ".partial"
_POLL_INTERVAL_S = 0.2
_WAIT_LOG_INTERVAL_S = 60.0
_ABANDONED_S = 7 * 24 * 3600.0  # a partial folder that nobody has written to for so long is removed

logger = logging.getLogger("microtron")


def write_header(entry: Path, names: list[str], facts: dict[str, Any]) -> None:
    """Writes the header, which must be the last file: facts, and the sizes of the named files."""
    sizes = {name: (entry / name).stat().st_size for name in names}
    write_durably(entry / _HEADER, json.dumps({**facts, "files": sizes}, indent=1).encode())
    sync_directory(entry)


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
    """Makes the entry by `fill(folder)`, if it is not there; the caller holds its lock.

    The folder has what an attempt that did not get to its end has left.
    """
    if is_whole(entry):
        return
    if entry.exists():
        logger.warning("cache entry %s is damaged; making it again", entry)
    work = entry.with_name(f"{entry.name}{_PARTIAL}")
    work.mkdir(parents=True, exist_ok=True)
    fill(work)
    if entry.exists():
        shutil.rmtree(entry)
    work.rename(entry)
    sync_directory(entry.parent)


def remove_abandoned(cache: Path) -> None:
    """Removes what was left by preparations that nobody has gone on with for a week."""
    for folder in [*cache.glob(f"*{_PARTIAL}"), *cache.glob(f"{TEXT}*")]:
        if not folder.is_dir():  # a lock
            continue
        with contextlib.suppress(OSError):  # another run may be at it
            written_at = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            entry = folder.with_name(folder.name.removesuffix(_PARTIAL))
            if time.time() - written_at > _ABANDONED_S:
                with locked([entry], wait=False):
                    shutil.rmtree(folder, ignore_errors=True)


def wait_for_entry(entry: Path) -> None:
    """Returns when the entry is there; if whoever makes it fails, the launcher ends this rank."""
    logged_at = time.perf_counter()
    while not is_whole(entry):
        time.sleep(_POLL_INTERVAL_S)
        if time.perf_counter() - logged_at > _WAIT_LOG_INTERVAL_S:
            logged_at = time.perf_counter()
            logger.info("waiting for local rank 0 to prepare %s", entry)


@contextlib.contextmanager
def locked(entries: Iterable[Path], *, wait: bool = True) -> Iterator[None]:
    """Holds the locks of entries, taken in one order, so that no two runs wait for each other.

    If it should not wait, raises BlockingIOError where another one holds a lock.
    """
    with contextlib.ExitStack() as stack:
        for entry in sorted(set(entries)):
            entry.parent.mkdir(parents=True, exist_ok=True)
            path = entry.with_name(f"{entry.name}.lock")
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                logger.info("waiting for another run that prepares the same text (%s)", path)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
