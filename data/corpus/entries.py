"""Entries of the cache that several processes fill together, and that survive kill -9.

An entry is filled as `*.partial`, synced to disk, then renamed. The process that fills it holds a
file lock, which the kernel releases when the process dies. A killed process leaves its partial
folder, and the next one resumes there.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from data.cache import is_complete, locked, progress_logger, sync_directory

TEXT = "text-"  # prefix of the temporary folders that hold text
_PARTIAL = ".partial"
_POLL_INTERVAL_S = 0.2
_ABANDONED_S = 7 * 24 * 3600.0  # partial folders that nobody has written to for so long are deleted

T = TypeVar("T")
logger = logging.getLogger("microtron")


def build_entry(entry: Path, fill: Callable[[Path], None]) -> None:
    """Create an entry with `fill(folder)` unless it is complete; the caller holds its lock.

    The folder contains whatever an interrupted attempt left there.
    """
    if is_complete(entry):
        return
    if entry.exists():
        logger.warning("cache entry %s is damaged; rebuilding it", entry)
    work = entry.with_name(f"{entry.name}{_PARTIAL}")
    work.mkdir(parents=True, exist_ok=True)
    fill(work)
    if entry.exists():
        shutil.rmtree(entry)
    work.rename(entry)
    sync_directory(entry.parent)


def rotated(items: Sequence[T], first: float) -> list[T]:
    """Return items beginning `first` (0 to 1) of the way, followed by those before."""
    start = int(first * len(items))
    return [*items[start:], *items[:start]]


def share_jobs(
    title: str, sizes: Mapping[Path, int], first: float
) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """Yield each path that no other process makes, until all exist; sizes are in bytes.

    The caller makes a path by a rename, and reports the bytes done to the function that comes with
    it. Meanwhile its lock is held, so the paths of a killed process are made by the others. Begins
    `first` (0 to 1) of the way.
    """
    todo, total = rotated([*sizes], first), sum(sizes.values())
    reach = progress_logger(title, total)

    def report(before: int, of_path: int) -> None:
        reach(before + of_path)

    while todo := [path for path in todo if not path.exists()]:
        done_bytes, has_worked = total - sum(sizes[path] for path in todo), False
        reach(done_bytes)
        for path in todo:
            with contextlib.suppress(BlockingIOError), locked([path], wait=False):
                if not path.exists():
                    has_worked = True
                    yield path, partial(report, done_bytes)
                done_bytes += sizes[path]
        if not has_worked:
            time.sleep(_POLL_INTERVAL_S)  # others hold all that is left


def remove_abandoned(cache: Path) -> None:
    """Delete unfinished folders untouched for a week."""
    for folder in [*cache.glob(f"*{_PARTIAL}"), *cache.glob(f"{TEXT}*")]:
        if not folder.is_dir():  # a lock
            continue
        with contextlib.suppress(OSError):  # another run may be using it
            written_at = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - written_at > _ABANDONED_S:
                with locked([folder.with_name(folder.name.removesuffix(_PARTIAL))], wait=False):
                    shutil.rmtree(folder, ignore_errors=True)


def require_entry(
    entry: Path, prepare: Callable[[], Callable[[Path], None]], texts: Iterable[Path]
) -> None:
    """Return when an entry is complete; shared locks on `texts` are held while it is made.

    `prepare` does what processes share, and returns the function that fills the entry, for
    `build_entry`.
    """
    if not is_complete(entry):
        with locked(texts, shared=True):
            if not is_complete(entry):  # else another process has built it
                fill = prepare()
                with locked([entry]):
                    build_entry(entry, fill)
