"""Rows of a run as they are written, for who watches it from outside."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]
Key = tuple[int, str]  # a row's step and its first metric


class JsonLines:
    """A file of rows with a step each, read as it grows.

    A run that resumes puts a file in its place that is cut at a checkpoint (metrics.py), one that
    starts over a new one. The file is kept open from look to look: the number by which a file is
    known is not given to another one before that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._offset = 0
        self._seen: dict[Key, bytes] = {}

    def look(self) -> tuple[int | None, list[Row]]:
        """The step from which on what was seen no longer counts, if any; rows not seen before.

        The rows are those of the file as it is: with such a step, all from it on.
        """
        was_replaced = self._open()
        if self._file is None:
            return None, []
        self._file.seek(self._offset)
        text = self._file.read()
        text = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(text)
        has = dict(_with_keys(text.splitlines()))
        stale_from = None
        if was_replaced:
            stale = (key[0] for key, line in self._seen.items() if has.get(key) != line)
            stale_from = min(stale, default=None)
            if stale_from is not None:
                self._forget_from(stale_from)
        new = {key: line for key, line in has.items() if key not in self._seen}
        self._seen |= new
        return stale_from, [json.loads(line) for line in new.values()]

    def look_again_from(self, step: int) -> list[Row]:
        """All rows of this step and later ones, as if they were new."""
        self._forget_from(step)
        self._offset = 0
        return self.look()[1]

    def _forget_from(self, step: int) -> None:
        self._seen = {key: line for key, line in self._seen.items() if key[0] < step}

    def _open(self) -> bool:
        """Have the file that is there now; whether it is another one than at the last look."""
        try:
            there = self.path.stat()
            if self._file is not None:
                have = os.fstat(self._file.fileno())
                if os.path.samestat(there, have) and have.st_size >= self._offset:
                    return False
                self._file.close()
            self._file, self._offset = self.path.open("rb"), 0
        except FileNotFoundError:  # not yet, or being replaced
            return False
        return True


def _with_keys(lines: Iterable[bytes]) -> Iterator[tuple[Key, bytes]]:
    """Raises ValueError if a line is no row."""
    for line in lines:
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"a line that is no row: {line[:80]!r}")
        yield (row["step"], next((name for name in row if "/" in name), "")), line
