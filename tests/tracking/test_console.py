"""The console."""

import logging
from collections.abc import Iterator

import pytest

from planning.page import size
from tracking.console import duration, printable, set_up_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Restore the logger afterwards."""
    logger = logging.getLogger("microtron")
    before = (logger.handlers, logger.propagate, logger.level)
    yield
    logger.handlers, logger.propagate, logger.level = before


@pytest.mark.parametrize(
    ("rank", "printed"),
    [(0, "step 1\na warning\nan error\n"), (3, "[rank 3] a warning\n[rank 3] an error\n")],
)
def test_other_ranks_log_warnings_with_their_rank(
    capsys: pytest.CaptureFixture[str], rank: int, printed: str
) -> None:
    logger = logging.getLogger("microtron")
    set_up_logging(rank)
    logger.info("step 1")
    logger.warning("a %s", "warning")
    logger.error("an error")
    assert capsys.readouterr().err == printed


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
