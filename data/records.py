"""What reading a source gives: records, and the places between them."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where reading goes on: in which file of the source, and after how many of its records."""

    file: int = 0
    record: int = 0


class Record(NamedTuple):
    """One record of a source: its documents, mostly one, or why there is none."""

    texts: list[str]
    reason: str | None
    next: Place
