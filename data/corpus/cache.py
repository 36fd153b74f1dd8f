"""Files and folders that survive kill -9: durable writes, locks, digests, and entries of the cache.

Locks are taken with flock, so hosts that share a cache need a file system where it works.

An entry is a folder that is complete or absent: it is filled as `*.partial`, synced to disk, then
renamed. Its header has the size and digest of each file, and a checksum of itself. The process that
fills an entry holds a file lock, which the kernel releases when the process dies. A killed process
leaves its partial folder, and the next one resumes there.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import xxhash
from tqdm import tqdm  # type: ignore[import-untyped]

TEXT = "text-"  # prefix of the temporary folders that hold text
_HEADER = "header.json"
_PARTIAL = ".partial"
_POLL_INTERVAL_S = 0.2
_LOG_INTERVAL_S = 5.0
_WAIT_LOG_INTERVAL_S = 60.0
_SAVE_INTERVAL_S = 30.0
_SETTLED_NS = 2_000_000_000
_ABANDONED_S = 7 * 24 * 3600.0  # partial folders that nobody has written to for so long are deleted

T = TypeVar("T")
logger = logging.getLogger("microtron")


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with path.open("wb") as file:
        file.write(content)
        sync_files([file])


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file atomically: a crash leaves either the old or the new content."""
    temporary = path.with_name(f"{path.name}.new")
    write_durably(temporary, content)
    temporary.replace(path)


@contextlib.contextmanager
def open_at(path: Path, length: int) -> Iterator[IO[bytes]]:
    """Open a file to continue writing after its first `length` bytes."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(length)
        file.seek(length)
        yield file


def sync_files(files: list[IO[bytes]]) -> None:
    """Wait until everything written to open files is on disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(entries: Iterable[Path], *, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Hold the locks of entries, always taken in the same order, so that no two runs deadlock.

    With `wait=False`, raises BlockingIOError if another process holds one of them. Any number of
    processes may hold a `shared` lock together.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with contextlib.ExitStack() as stack:
        for entry in sorted(set(entries)):
            entry.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(entry.with_name(f"{entry.name}.lock").open("wb"))
            try:
                fcntl.flock(file, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                # It may belong to another run, or to another rank of this one.
                logger.info("waiting for another process to finish with %s", entry)
                fcntl.flock(file, operation)
        yield


class _LogWriter:
    """A file whose lines go to the log."""

    # The names that tqdm calls.
    def write(self, text: str) -> None:
        if line := text.strip():
            logger.info("%s", line)

    def flush(self) -> None:
        pass


class Progress:
    """Show the progress of a long job over bytes: a bar on a terminal, else lines in the log."""

    def __init__(self, title: str, total_bytes: int | None) -> None:
        # In a file or a pipe, a bar would be one long line of carriage returns.
        is_terminal = sys.stderr.isatty()
        interval_s = 0.1 if is_terminal else _LOG_INTERVAL_S
        self._is_first = True
        self._bar = tqdm(
            desc=title,
            total=total_bytes,
            unit="B",
            unit_scale=True,
            leave=False,
            file=sys.stderr if is_terminal else _LogWriter(),
            mininterval=interval_s,
            delay=interval_s,
            miniters=1,
            smoothing=0,
            disable=not logger.isEnabledFor(logging.INFO),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def reach(self, done_bytes: int) -> None:
        """Set the bytes done so far; the first call's were done earlier and have no rate."""
        if self._is_first:
            self._is_first, self._bar.initial = False, done_bytes
        self._bar.update(done_bytes - self._bar.n)


def file_digest(file: Path) -> bytes:
    """Return the xxh3_128 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).digest()


def digests(files: Sequence[Path], cache: Path) -> list[bytes]:
    """Return the digest of each file; `cache`/digests.json remembers those of unchanged files."""
    path = cache / "digests.json"
    known = _read_index(path)
    stamps = [_stamp(file) for file in files]
    if all(known.get(stamp[0], [None])[0] == stamp[1:] for stamp in stamps):
        return [bytes.fromhex(known[stamp[0]][1]) for stamp in stamps]
    if cache.exists() and not os.access(cache, os.W_OK):
        return [file_digest(file) for file in files]
    found, done_bytes, saved_at = [], 0, time.monotonic()
    total_bytes = sum(file.stat().st_size for file in files)
    # Ranks and runs take turns, so that each file is read once.
    with locked([path]), Progress("hashing files", total_bytes) as progress:
        known = _read_index(path)
        for file in files:
            progress.reach(done_bytes)
            name, *stamp = _stamp(file)
            # A file written just now may change again within the resolution of its times.
            is_settled = time.time_ns() - stamp[1] > _SETTLED_NS
            is_known = known.get(name, [None])[0] == stamp
            digest = known[name][1] if is_known else file_digest(file).hex()
            if is_settled:
                known[name] = [stamp, digest]
            found.append(bytes.fromhex(digest))
            done_bytes += stamp[0]
            if time.monotonic() - saved_at > _SAVE_INTERVAL_S:
                replace_durably(path, json.dumps(known).encode())
                saved_at = time.monotonic()
        replace_durably(path, json.dumps(known).encode())
    return found


def _read_index(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: hash the files again
        index: dict[str, Any] = json.loads(path.read_bytes())
        return index
    return {}


def _stamp(file: Path) -> list[Any]:
    """Return name, size, times and inode of a file; unlike mtime, ctime cannot be set at will."""
    status = file.stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [str(file.absolute()), status.st_size, *times, status.st_ino]


def write_header(entry: Path, names: list[str], facts: dict[str, Any]) -> None:
    """Write the header of an entry, its last file: facts, and the digests of the named files."""
    paths = {name: entry / name for name in names}
    files = {name: [p.stat().st_size, file_digest(p).hex()] for name, p in paths.items()}
    content = {**facts, "files": files}
    header = {**content, "checksum": _checksum(content)}
    write_durably(entry / _HEADER, json.dumps(header, indent=1).encode())
    sync_directory(entry)


def read_header(entry: Path) -> dict[str, Any]:
    """Return the facts of an entry, which `is_complete` has verified."""
    header: dict[str, Any] = json.loads((entry / _HEADER).read_bytes())
    return header


def is_complete(entry: Path) -> bool:
    """Whether header and files match their checksums; files verified before are not read again."""
    try:
        header = read_header(entry)
        if header.pop("checksum") != _checksum(header):
            return False
        files = header["files"]
        found = [digest.hex() for digest in digests([entry / name for name in files], entry.parent)]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # a file is missing, or the header is not one of ours
    return found == [digest for _, digest in files.values()]


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


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


class Job(NamedTuple):
    """A part of a larger job, which leaves a file or folder."""

    path: Path
    size: int  # bytes
    run: Callable[[Callable[[int], None]], None]  # reports the bytes done to its argument


def rotated(items: Sequence[T], first: float) -> list[T]:
    """Return items beginning `first` (0 to 1) of the way, followed by those before."""
    start = int(first * len(items))
    return [*items[start:], *items[:start]]


def share_jobs(title: str, jobs: Sequence[Job], first: float) -> None:
    """Return when all jobs are done, by this process or others that share them.

    A job is done when its path exists, so it must appear by a rename. A process takes any job that
    no other one holds, and begins `first` (0 to 1) of the way. So the jobs of a killed process are
    done by the others.
    """
    todo = deque(job for job in rotated(jobs, first) if not job.path.exists())
    total = sum(job.size for job in jobs)
    num_held, looked_at = 0, time.monotonic()
    with Progress(title, total or None) as progress:
        while todo:
            done_bytes = total - sum(job.size for job in todo)
            progress.reach(done_bytes)
            job = todo.popleft()

            def reach(job_bytes: int, before: int = done_bytes) -> None:
                progress.reach(before + job_bytes)

            try:
                with locked([job.path], wait=False):
                    if not job.path.exists():
                        job.run(reach)
                num_held = 0
            except BlockingIOError:
                todo.append(job)
                num_held += 1
                if num_held < len(todo):
                    continue
                time.sleep(_POLL_INTERVAL_S)  # others hold all that is left
                num_held = 0
            if time.monotonic() - looked_at > _LOG_INTERVAL_S:  # for the progress shown
                todo = deque(job for job in todo if not job.path.exists())
                looked_at = time.monotonic()


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


def wait_for_entry(entry: Path) -> None:
    """Return when the entry is complete; if its builder fails, the launcher ends this rank."""
    logged_at = time.perf_counter()
    while not is_complete(entry):
        time.sleep(_POLL_INTERVAL_S)
        if time.perf_counter() - logged_at > _WAIT_LOG_INTERVAL_S:
            logged_at = time.perf_counter()
            logger.info("waiting for local rank 0 to prepare %s", entry)
