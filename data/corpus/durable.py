"""Durable writes, and file locks, which the kernel releases when their holder dies."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger("microtron")


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Writes a file that has either its old content or the new one, whatever happens."""
    temporary = path.with_name(f"{path.name}.new")
    write_durably(temporary, content)
    temporary.replace(path)


@contextlib.contextmanager
def open_at(path: Path, length: int) -> Iterator[IO[bytes]]:
    """Opens a file to go on writing after its first `length` bytes."""
    path.touch()
    with path.open("r+b") as file:
        file.truncate(length)
        file.seek(length)
        yield file


def sync_files(files: list[IO[bytes]]) -> None:
    """Waits until what was written to open files is on the disk."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Waits until the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
