"""A folder that a program makes: it is there whole or not at all, and nothing is written over."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs import ConfigError


def require_new(path: Path, key: str) -> None:
    """Raises ConfigError, naming `key`, if something is there already; an empty folder is new."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{key}={path} is a file or a link; choose a folder, new or empty", key)
    if path.is_mount():
        raise ConfigError(f"{key}={path} is a mount point; choose a folder in it", key)
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(
            f"{key}={path} is a folder with something in it, which stays as it is; choose another "
            f"{key}, or remove it first",
            key,
        )


@contextmanager
def new_folder(path: Path, key: str) -> Iterator[Path]:
    """Yields a hidden folder beside `path` to fill, which becomes `path` if nothing is raised.

    What a killed program has left there is removed first. Raises ConfigError as `require_new`, or
    if another process is filling it.
    """
    require_new(path, key)
    work = path.absolute().with_name(f".{path.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{key}={path} is being made by another process; wait for it, or choose another "
                f"{key}",
                key,
            ) from None
        _clear(work)
        try:
            yield work
            require_new(path, key)
            work.rename(path)
        except BaseException:
            shutil.rmtree(work)
            raise
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
