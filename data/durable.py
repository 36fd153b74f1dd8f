"""Files whose content is on the disk when a function returns, and not half of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


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
