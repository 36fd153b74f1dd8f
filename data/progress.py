"""Progress of a long job over bytes: a bar on a terminal, else a line in the log every few
seconds."""

import logging
import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]

_LOG_INTERVAL_S = 5.0

logger = logging.getLogger("microtron")


class Progress:
    """Context manager that shows how much of `total_bytes` is done."""

    def __init__(self, title: str, total_bytes: int) -> None:
        self._title = title
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._logged_at = time.perf_counter()
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

    def advance(self, num_bytes: int) -> None:
        """Adds to what is done, and shows it if it is time to."""
        self._done_bytes += num_bytes
        self._bar.update(num_bytes)
        now = time.perf_counter()
        if self._bar.disable and now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            percent = 100 * self._done_bytes / max(1, self._total_bytes)
            logger.info("%s: %.0f%% of %d bytes", self._title, percent, self._total_bytes)
