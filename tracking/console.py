"""Console output: plain text, coloured only on a terminal."""

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Literal, TextIO

logger = logging.getLogger("microtron")

Style = Literal["plain", "bold", "dim", "yellow", "red"]
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# ECMA-48, 8.3.117: select graphic rendition.
_CODES: dict[Style, str] = {"bold": "1", "dim": "2", "yellow": "33", "red": "31"}


class StyledLine:
    """A log message in parts, each with a style that only a terminal shows."""

    def __init__(self, *parts: tuple[str, Style]) -> None:
        self.parts = parts

    def __str__(self) -> str:
        return "".join(text for text, _ in self.parts)


def paint(text: str, style: Style) -> str:
    """Wrap text in the escape codes of a style."""
    return text if style == "plain" else f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def supports_colour(stream: TextIO) -> bool:
    """Return whether the stream is a colour terminal and `NO_COLOR` is unset or empty."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()


class _ColourFormatter(logging.Formatter):
    """Colours warnings yellow, errors red, and a StyledLine by its parts."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.ERROR:
            return paint(super().format(record), "red")
        if record.levelno >= logging.WARNING:
            return paint(super().format(record), "yellow")
        if isinstance(record.msg, StyledLine):
            return "".join(paint(text, style) for text, style in record.msg.parts)
        return super().format(record)


def set_up_logging(rank: int) -> None:
    """Log to stderr: INFO from rank 0, warnings with the rank number from all others."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    formatter = _ColourFormatter if supports_colour(sys.stderr) else logging.Formatter
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(f"{prefix}%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def log_table(facts: Mapping[str, str]) -> None:
    """Log one aligned line per fact, leaving out empty ones."""
    width = max(map(len, facts)) + 1
    for name, fact in facts.items():
        if fact:
            logger.info(StyledLine((f"  {name + ':':<{width}}  ", "dim"), (fact, "plain")))


def printable(text: str) -> str:
    """Escape control characters, so that generated text cannot control the terminal."""
    return _CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], text)


def duration(seconds: float) -> str:
    """Format as `m:ss`, or `h:mm:ss` from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
