"""Folders that appear whole or not at all, and can be gone on with after a kill.

A folder is filled under a temporary name, with everything in it on the disk, and appears by one
rename. Its header has the size and digest of each file and its own checksum. A file is verified
whenever its size, times or inode are new. Who fills a folder holds a file lock, which the kernel
releases when the process dies; what a killed process has filled stays, and the next one goes on
from there.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from data.corpus.durable import locked, sync_directory, write_durably
from data.corpus.files import digests, file_digest

TEXT = "text-"  # what the names of folders begin with that are of use only to make others
_HEADER = "header.json"
_PARTIAL = ".partial"
_POLL_INTERVAL_S = 0.2
_WAIT_LOG_INTERVAL_S = 60.0
_ABANDONED_S = 7 * 24 * 3600.0  # a partial folder that nobody has written to for so long is removed

logger = logging.getLogger("microtron")


def write_header(entry: Path, names: list[str], facts: dict[str, Any]) -> None:
    """Writes the header, which must be the last file: facts, and what the named files hold."""
    paths = {name: entry / name for name in names}
    files = {name: [p.stat().st_size, file_digest(p).hex()] for name, p in paths.items()}
    content = {**facts, "files": files}
    header = {**content, "checksum": _checksum(content)}
    write_durably(entry / _HEADER, json.dumps(header, indent=1).encode())
    sync_directory(entry)


def read_header(entry: Path) -> dict[str, Any]:
    """Returns the facts of an entry, which `is_whole` has verified."""
    header: dict[str, Any] = json.loads((entry / _HEADER).read_text())
    return header


def is_whole(entry: Path) -> bool:
    """True if header and files are as they were written; files that are as they were when they
    were last verified are not read."""
    try:
        header = read_header(entry)
        checksum, files = header.pop("checksum"), header["files"]
        paths = [entry / name for name in files]
        sizes = [size for size, _ in files.values()]
        if checksum != _checksum(header) or [path.stat().st_size for path in paths] != sizes:
            return False
        found = [digest.hex() for digest in digests(paths, entry.parent)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # missing, or no header that we have written
    return found == [digest for _, digest in files.values()]


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


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
