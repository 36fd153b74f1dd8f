"""How a run ends before its last step: signals, a launcher that dies, and the exit codes.

A handler only sets a flag: it may interrupt any line, also one that writes a file. All ranks agree
on the flag at a step boundary, so that they save the same step and leave together. A second signal,
a second after the first or later, ends the process at once (torchrun may deliver one Ctrl-C twice,
but not that far apart).
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from parallel import Mesh, sum_flags

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECOND_SIGNAL_AFTER_S = 1.0
_PR_SET_PDEATHSIG = 1
_DIFFERENCES_SHOWN = 5


class FatalError(RuntimeError):
    """What all ranks have found at once and no further step can mend: ends the run, unsaved."""

    exit_code: int


class NonFiniteError(FatalError):
    """Losses or gradient norms that are not finite, and nothing left to try."""

    exit_code = 5

    def __init__(self, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: {what}; the run has ended without saving; resume from the last "
            "checkpoint with a smaller optimizer.lr"
        )


class ReplicaMismatchError(FatalError):
    """Copies of one tensor that should be alike and are not."""

    exit_code = 6

    def __init__(self, step: int, differences: list[str]) -> None:
        shown = "; ".join(differences[:_DIFFERENCES_SHOWN])
        more = len(differences) - _DIFFERENCES_SHOWN
        super().__init__(
            f"step {step}: ranks hold different copies of {shown}"
            f"{f'; and of {more} more' if more > 0 else ''}; the run has ended without saving; "
            "resume from the last checkpoint, and if one rank is named again, leave out its host"
        )


class SaveError(FatalError):
    """A last checkpoint, or several in a row, that cannot be written."""

    exit_code = 1

    def __init__(self, step: int, saved_step: int, why: str, after: str = "") -> None:
        super().__init__(
            f"step {step} is not saved{after}: {why}; fix that and resume, which goes on from step "
            f"{saved_step}"
        )


class StopSignals:
    """The signals this process has got.

    Until `training` begins there is nothing to save, and a signal ends the process by SystemExit.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._training = False
        for number in _SIGNALS:
            # nohup has a run ignore SIGHUP, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _ask_for_a_signal_when_the_launcher_dies()

    def training(self) -> None:
        """From here on, a signal asks for a save at the next step boundary."""
        self._training = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            sys.exit(128 + number)
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
        elif now - self._received_at >= _SECOND_SIGNAL_AFTER_S:
            os._exit(128 + number)

    def agreed(self, mesh: Mesh) -> signal.Signals | None:
        """The signal for which all ranks stop now, or None; every rank calls this at each step."""
        counts = sum_flags(mesh, [self.received == number for number in _SIGNALS])
        return next((number for number, n in zip(_SIGNALS, counts, strict=True) if n), None)


def _ask_for_a_signal_when_the_launcher_dies() -> None:
    """Have the kernel send SIGTERM if torchrun is killed, so that no orphan trains on (Linux)."""
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before we asked
        sys.exit(128 + signal.SIGTERM)
