"""File locks, which the kernel releases when their holder dies."""

import contextlib
import fcntl
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger("microtron")


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
