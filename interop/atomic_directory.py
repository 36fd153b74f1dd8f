"""A new directory that appears complete or not at all; existing files are never overwritten."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import ConfigError


def require_new(path: Path, key: str) -> None:
    """Raise ConfigError, naming the setting `key`, unless `path` is an empty directory or free."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{key}={path} is a file or a link; choose another {key}", key)
    if path.is_mount():
        raise ConfigError(f"{key}={path} is a mount point; choose a directory inside it", key)
    if path.is_dir() and any(path.iterdir()):
        raise ConfigError(
            f"{key}={path} already exists and is not empty; choose another {key} or remove it", key
        )


@contextmanager
def atomic_directory(path: Path, key: str) -> Iterator[Path]:
    """Yield a hidden directory to fill, which is renamed to `path` if the block does not raise.

    Removes what a killed process has left there. Raises ConfigError as `require_new` does, or if
    another process is writing it.
    """
    require_new(path, key)
    work = path.absolute().with_name(f".{path.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"{key}={path} is being written by another process; wait, or choose another {key}", key
        ) from None
    try:
        for entry in work.iterdir():
            is_folder = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_folder else entry.unlink()
        yield work
        require_new(path, key)
        work.rename(path)
    except BaseException:
        shutil.rmtree(work)
        raise
    finally:
        os.close(lock)
