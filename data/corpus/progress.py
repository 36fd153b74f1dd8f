"""Progress of a long job over bytes: a bar on a terminal, else a line in the log every few
seconds; both with rate and time left."""

import logging
import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]

_LOG_INTERVAL_S = 5.0

logger = logging.getLogger("microtron")


class Progress:
    """Context manager that shows how much of `total_bytes` is done; None: nobody knows the total.

    What is said to be done first is an earlier attempt's: it counts in the share, not in the rate.
    """

    def __init__(self, title: str, total_bytes: int | None) -> None:
        self._title = title
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._first_bytes: int | None = None
        self._started_at = self._logged_at = time.perf_counter()
        # Into a file or a pipe, a bar would write one long line of carriage returns.
        self._bar = tqdm(
            desc=title,
            total=total_bytes,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def reach(self, done_bytes: int) -> None:
        """Sets what is done, and shows it if it is time to."""
        if self._first_bytes is None:
            self._first_bytes = self._bar.initial = done_bytes
        self._bar.update(done_bytes - self._done_bytes)
        self._done_bytes = done_bytes
        now = time.perf_counter()
        if self._bar.disable and now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            logger.info("%s: %s", self._title, self._told(now - self._started_at))

    def _told(self, elapsed_s: float) -> str:
        rate = (self._done_bytes - (self._first_bytes or 0)) / elapsed_s
        done = f"{self._done_bytes / 1e6:,.0f} MB"
        if self._total_bytes is None:
            return f"{done}, {rate / 1e6:.1f} MB/s"
        share = self._done_bytes / max(1, self._total_bytes)
        told = f"{share:.0%} of {self._total_bytes / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        if not rate:
            return told
        minutes, seconds = divmod(round(max(0, self._total_bytes - self._done_bytes) / rate), 60)
        return f"{told}, {minutes}:{seconds:02d} left"
