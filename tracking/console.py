"""What a person sees on the console: plain lines, with colours on a terminal alone.

Whoever logs a line writes its text; a `Line` also says how its parts look. Only the handler that
writes to a terminal knows about colours, so a file, a pipe or another handler gets the same text
without.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Literal, TextIO

logger = logging.getLogger("microtron")

Look = Literal["plain", "bold", "dim", "yellow", "red"]
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# ECMA-48, 8.3.117: select graphic rendition.
_CODES: dict[Look, str] = {"bold": "1", "dim": "2", "yellow": "33", "red": "31"}


class Line:
    """A line to log, in parts that each have a look; as a text it is the parts alone."""

    def __init__(self, *parts: tuple[str, Look]) -> None:
        self.parts = parts

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts)

    def painted(self) -> str:
        """The line for a terminal."""
        return "".join(paint(text, look) for text, look in self.parts)


def paint(text: str, look: Look) -> str:
    """The text with what makes a terminal show it so."""
    return text if look == "plain" else f"\x1b[{_CODES[look]}m{text}\x1b[0m"


def has_colours(stream: TextIO) -> bool:
    """Whether it is a terminal that shows colours, for somebody who has not declined them."""
    # https://no-color.org: set to anything, and not empty.
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()


class _Colours(logging.Formatter):
    """Warnings yellow, errors red, and lines as they say."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        if record.levelno >= logging.WARNING:
            look: Look = "red" if record.levelno >= logging.ERROR else "yellow"
            return paint(super().format(record), look)
        return record.msg.painted() if isinstance(record.msg, Line) else super().format(record)


def set_up_logging(rank: int) -> None:
    """INFO from rank 0, warnings from every rank with its number, on stderr."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = _Colours if has_colours(sys.stderr) else logging.Formatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def log_table(facts: Mapping[str, str]) -> None:
    """A line for each fact, under one another behind their names; none for one that is empty."""
    width = max(map(len, facts))
    for name, fact in facts.items():
        if fact:
            logger.info(Line((f"  {name:<{width}}  ", "dim"), (fact, "plain")))


def printable(text: str) -> str:
    """A text that a model has written, without what would make a terminal do something."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
