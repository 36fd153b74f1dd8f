"""The console: plain text everywhere, colours only on a terminal."""

import contextlib
import logging
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from planning.page import size
from tracking.console import StyledLine, duration, log_table, printable, set_up_logging

LINE = StyledLine(("step 1/9", "plain"), (" | ", "dim"), ("loss 2.5000", "bold"))
PLAIN = "step 1/9 | loss 2.5000\n  model:  2 layers\n  step:   9 tokens\na warning\nan error\n"


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the logger afterwards, and use an ordinary terminal."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("microtron")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate, logger.level = before


def log_something(rank: int = 0) -> None:
    logger = logging.getLogger("microtron")
    set_up_logging(rank)
    logger.info(LINE)
    log_table({"model": "2 layers", "wandb": "", "step": "9 tokens"})
    logger.warning("a %s", "warning")
    logger.error("an error")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> str:
    """Return what a pseudo-terminal receives."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        log_something(rank)
    pieces = []
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:
        while piece := terminal.read(4096):  # raises OSError at the end
            pieces.append(piece)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bold loss, dim names and separators, yellow warnings, red errors."""
    assert on_a_terminal(monkeypatch) == (
        "step 1/9\x1b[2m | \x1b[0m\x1b[1mloss 2.5000\x1b[0m\n"
        "\x1b[2m  model:  \x1b[0m2 layers\n"
        "\x1b[2m  step:   \x1b[0m9 tokens\n"
        "\x1b[33ma warning\x1b[0m\n"
        "\x1b[31man error\x1b[0m\n"
    )


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_can_be_switched_off(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert on_a_terminal(monkeypatch) == PLAIN


def test_an_empty_no_color_keeps_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[1mloss" in on_a_terminal(monkeypatch)


def test_a_file_gets_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "log").open("w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        log_something()
    assert (tmp_path / "log").read_text() == PLAIN


def test_other_ranks_log_warnings_with_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_terminal(monkeypatch, rank=3) == (
        "\x1b[33m[rank 3] a warning\x1b[0m\n\x1b[31m[rank 3] an error\x1b[0m\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")]
)
def test_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(1536, "1.50 KiB"), (20 << 20, "20.0 MiB"), (3 << 40, "3.00 TiB")]
)
def test_a_size(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text


def test_generated_text_cannot_control_the_terminal() -> None:
    assert printable("a\tb\nc\x1b[31m\x07\r\x9bé") == "a\tb\nc\\x1b[31m\\x07\\r\\x9bé"
