"""Files and folders that survive kill -9: durable writes, locks, digests, and entries of the cache.

Locks are taken with flock, so hosts that share a cache need a file system where it works.

An entry is a folder that is complete or absent; data/corpus/entries.py fills it. Its header has the
size and digest of each file, and a checksum of itself.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import xxhash

_HEADER = "header.json"
_LOG_INTERVAL_S = 5.0
_SAVE_INTERVAL_S = 30.0
_SETTLED_NS = 2_000_000_000

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


def sync_files(files: Sequence[IO[bytes]]) -> None:
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


def progress_logger(title: str, total_bytes: int) -> Callable[[int], None]:
    """Return a function that logs the bytes done so far, and their rate, every few seconds.

    The bytes of its first call were done earlier and have no rate.
    """
    started_at = logged_at = time.monotonic()
    first_bytes: int | None = None

    def reach(done_bytes: int) -> None:
        nonlocal first_bytes, logged_at
        first_bytes = done_bytes if first_bytes is None else first_bytes
        now = time.monotonic()
        if now - logged_at > _LOG_INTERVAL_S:
            logged_at, rate = now, (done_bytes - first_bytes) / (now - started_at)
            total = f" of {total_bytes / 1e6:,.0f}" if total_bytes else ""
            logger.info("%s: %.0f%s MB, %.1f MB/s", title, done_bytes / 1e6, total, rate / 1e6)

    return reach


def file_digest(file: Path) -> bytes:
    """Return the xxh3_128 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).digest()


def digests(files: Sequence[Path], cache: Path) -> list[bytes]:
    """Return the digest of each file; `cache`/digests.json remembers those of unchanged files."""
    path = cache / "digests.json"
    known, stamps = _read_checked(path) or {}, [_stamp(file) for file in files]
    if all(known.get(name, [None])[0] == stamp for name, stamp in stamps):
        return [bytes.fromhex(known[name][1]) for name, _ in stamps]
    if cache.exists() and not os.access(cache, os.W_OK):
        return [file_digest(file) for file in files]
    found, done_bytes, saved_at = [], 0, time.monotonic()
    # Ranks and runs take turns, so that each file is read once.
    reach = progress_logger("hashing files", sum(stamp[0] for _, stamp in stamps))
    with locked([path]):
        known = _read_checked(path) or {}
        for file in files:
            reach(done_bytes)
            name, stamp = _stamp(file)
            entry = known.get(name, [None])
            if entry[0] != stamp:
                entry = [stamp, file_digest(file).hex()]
            # A file written just now may change again within the resolution of its times.
            if time.time_ns() - stamp[1] > _SETTLED_NS:
                known[name] = entry
            found.append(bytes.fromhex(entry[1]))
            done_bytes += stamp[0]
            if time.monotonic() - saved_at > _SAVE_INTERVAL_S:
                replace_durably(path, json.dumps(_with_checksum(known)).encode())
                saved_at = time.monotonic()
        replace_durably(path, json.dumps(_with_checksum(known)).encode())
    return found


def _stamp(file: Path) -> tuple[str, list[int]]:
    """Return name, and size, times and inode of a file; ctime cannot be set at will."""
    status = file.stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return str(file.absolute()), [status.st_size, *times, status.st_ino]


def write_header(entry: Path, names: list[str], facts: dict[str, Any]) -> None:
    """Write the header of an entry, its last file: facts, and the digests of the named files."""
    paths = {name: entry / name for name in names}
    files = {name: [p.stat().st_size, file_digest(p).hex()] for name, p in paths.items()}
    header = _with_checksum({**facts, "files": files})
    write_durably(entry / _HEADER, json.dumps(header, indent=1).encode())
    sync_directory(entry)


def read_header(entry: Path) -> dict[str, Any]:
    """Return the facts of an entry, which `is_complete` has verified."""
    header: dict[str, Any] = json.loads((entry / _HEADER).read_bytes())
    return header


def is_complete(entry: Path) -> bool:
    """Whether header and files match their checksums; files verified before are not read again."""
    header = _read_checked(entry / _HEADER)
    if header is None:
        return False
    files = header["files"]
    try:
        found = [digest.hex() for digest in digests([entry / name for name in files], entry.parent)]
    except OSError:
        return False  # a file is missing
    return found == [digest for _, digest in files.values()]


def _with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(content, sort_keys=True).encode()
    return {**content, "checksum": xxhash.xxh3_128_hexdigest(text)}


def _read_checked(path: Path) -> dict[str, Any] | None:
    """Return a mapping without its checksum; None if it is missing, damaged or not one of ours."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        content: dict[str, Any] = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        return content if _with_checksum(content)["checksum"] == checksum else None
    return None
