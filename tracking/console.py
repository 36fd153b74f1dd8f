"""Console output."""

import logging
import re
import sys

logger = logging.getLogger("microtron")

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def set_up_logging(rank: int) -> None:
    """Log to stderr: INFO from rank 0, warnings with the rank number from all others."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{f'[rank {rank}] ' if rank else ''}%(message)s"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def printable(text: str) -> str:
    """Escape control characters, so that generated text cannot control the terminal."""
    return _CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], text)


def duration(seconds: float) -> str:
    """Format as `m:ss`, or `h:mm:ss` from one hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
