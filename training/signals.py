"""Signals that stop a run. All ranks agree on one at a step boundary, save, and exit together."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

import torch

from configs.launch import stop_when_launcher_dies
from parallel import Mesh, sum_on_host

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECOND_SIGNAL_AFTER_S = 1.0  # a launcher may deliver one signal twice, but not this far apart
_STDERR = 2


class StopSignals:
    """The signal that this process has received, if any.

    The handler may interrupt any line, so it only sets a flag and writes one line. Before
    `training` there is nothing to save, and a signal raises SystemExit.
    """

    NONE = (0.0,) * len(_SIGNALS)  # `flags` without a signal

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._training = False
        self._is_rank_zero = os.environ.get("RANK", "0") == "0"
        for number in _SIGNALS:
            # nohup makes a run ignore SIGHUP on purpose.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        stop_when_launcher_dies()

    def training(self) -> None:
        """Let signals request a save at the next step boundary from now on."""
        self._training = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            sys.exit(128 + number)
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            if self._is_rank_zero and number == signal.SIGINT:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(_STDERR, b"\nsaving; press again to stop now\n")
        elif now - self._received_at >= _SECOND_SIGNAL_AFTER_S:
            os._exit(128 + number)

    def flags(self) -> list[float]:
        """1.0 for the signal that this rank has received, 0.0 for the others."""
        return [float(self.received == number) for number in _SIGNALS]

    def agreed(self, sums: Sequence[float]) -> signal.Signals | None:
        """The signal that any rank has received, from the flags summed over ranks, or None."""
        return next((number for number, n in zip(_SIGNALS, sums, strict=True) if n), None)

    def agree_now(self, mesh: Mesh) -> signal.Signals | None:
        """Sum the flags over ranks and return `agreed`; every rank calls this."""
        return self.agreed(sum_on_host(mesh, torch.empty(0, dtype=torch.float64), self.flags()))
