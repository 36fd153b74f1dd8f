"""The watch over a run that has stopped moving: who is to blame, and its end with exit code 75.

Nothing is asked of the main thread. A thread looks, a few times in each limit, at which line the
main thread is; what is at the same line of the same calls as before, in the same step, has not
moved. It tells the other ranks through `parallel.Heartbeats`, and reads theirs. When no rank that
still answers has moved for `run.hang_timeout_s`, the run hangs: a rank that works while others wait
for it does not count as hanging. All ranks come to that by themselves, print one line each, and end
within two looks of each other; the lowest that still answers writes exit.json. Its stacks and those
of the ranks to blame are in `stacks/` of the run folder.

Waiting for the files of checkpoints may take `RunConfig.file_timeout_s`, with a warning per limit.

A thread cannot look while C code holds the interpreter's lock. faulthandler's timer, put off at
each look, then prints the stacks and ends the process.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import CodeType, FrameType

from checkpoints import is_file_access
from configs import leave_error
from parallel import Heartbeats, is_blocking_frame, is_transport_frame, machine_id
from training.state import Run

logger = logging.getLogger("microtron")

EXIT_HANG = 75
_LOOKS_IN_LIMIT, _LONGEST_BETWEEN_LOOKS_S = 20, 5.0
_LOOKS_BEFORE_LEAVING = 2  # for the others to see the same
_SILENT_AFTER = 0.5  # of the limit
_RANKS_IN_DETAIL = 8  # at most so many are named in the report, and leave their stacks
_BACKSTOP_AFTER = 1.5  # of the limit
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    host: str
    machine: str
    pid: int
    looks: int = 0  # so far: a beat that does not change is of a process that does not run
    step: int = 0  # finished updates
    phase: str = ""  # the function of the story that it is in
    line: str = ""  # the innermost of our own, outside the functions that wait
    is_waiting: bool = False  # for other ranks, or a device that may wait for them
    is_in_file: bool = False  # waiting for a file of a checkpoint
    still_s: float = 0.0  # since it has moved; in a file, a tenth of that
    has_ended: bool = False


class Watchdog:
    """Watches a run from where it is entered to where it is left."""

    def __init__(self, run: Run) -> None:
        self._folder, self._mesh = run.folder, run.mesh
        self._limit_s = run.config.run.hang_timeout_s  # 0: no watch
        self._file_limit_s = run.config.run.file_timeout_s
        self._interval_s = min(self._limit_s / _LOOKS_IN_LIMIT, _LONGEST_BETWEEN_LOOKS_S)
        self._beat = Beat(socket.gethostname(), machine_id(), os.getpid())
        self._position: object = None
        self._silent_s: dict[int, float] = {}
        self._seen: dict[int, Beat] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit_s > 0:
            self._story: CodeType = sys._getframe(1).f_code
            self._heartbeats = Heartbeats(self._mesh, self._interval_s)
            self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._limit_s > 0:
            self._left.set()
            self._thread.join()
            # A rank that leaves by an error of its own is one that the others may wait for.
            self._heartbeats.publish(asdict(self._beat) | {"has_ended": kind is None})
            self._heartbeats.close()

    def _watch(self) -> None:
        looked_at = time.monotonic()
        try:
            while not self._left.wait(self._interval_s):
                faulthandler.dump_traceback_later(_BACKSTOP_AFTER * self._limit_s, exit=True)
                now = time.monotonic()
                # What a stopped process has not seen does not count: it may be that all were.
                seen_s = min(now - looked_at, 2 * self._interval_s)
                looked_at = now
                self._look(seen_s)
                self._heartbeats.publish(asdict(self._beat))
                beats = self._read_board(seen_s)
                if all(beat.still_s >= self._limit_s for beat in self._answering(beats).values()):
                    self._end(beats)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look(self, seen_s: float) -> None:
        """Make this rank's next beat."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames: list[FrameType] = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        # A backend in Python waits on several lines: to be inside it is to stand still.
        inside = [number for number, frame in enumerate(frames) if is_transport_frame(frame.f_code)]
        del frames[: max(inside, default=-1) + 1]
        before_s, step = self._beat.still_s, self._folder.step or 0
        position = (step, [(frame.f_code, frame.f_lineno) for frame in frames])
        own = next((number for number, frame in enumerate(frames) if _is_ours(frame)), 0)
        waits = is_blocking_frame(frames[own].f_code)
        calls = [frame.f_code for frame in frames]
        story = calls.index(self._story) if self._story in calls else 0
        stood = position == self._position
        self._position = position
        self._beat = replace(
            self._beat,
            looks=self._beat.looks + 1,
            step=step,
            phase=calls[max(story - 1, 0)].co_name,
            line=_line(frames[own + waits]),
            is_waiting=waits
            or any("torch/distributed" in code.co_filename for code in calls[:own]),
            is_in_file=any(is_file_access(code) for code in calls),
            still_s=0.0,
        )
        if stood:
            self._stand_still(before_s, seen_s)

    def _stand_still(self, before_s: float, seen_s: float) -> None:
        """Count the time since the last look, and report each limit that passes in a file."""
        in_file = self._beat.is_in_file and not self._beat.is_waiting
        patience = self._file_limit_s / self._limit_s if in_file else 1.0
        self._beat = beat = replace(self._beat, still_s=before_s + seen_s / patience)
        waited_s = patience * beat.still_s
        if in_file and waited_s // self._limit_s > patience * before_s // self._limit_s:
            message = "step %d: waiting for a file for %.0f s, at %s; the run ends after %.0f s"
            logger.warning(message, beat.step, waited_s, beat.line, self._file_limit_s)

    def _read_board(self, seen_s: float) -> dict[int, Beat]:
        """All known beats; counts for how long each rank has been silent."""
        me = self._mesh.world.rank
        beats = {rank: Beat(**beat) for rank, beat in self._heartbeats.board.items()}
        beats[me] = self._beat
        for rank, beat in beats.items():
            is_new = beat != self._seen.get(rank)
            self._silent_s[rank] = 0.0 if is_new else self._silent_s[rank] + seen_s
        self._seen = beats
        return {rank: beat for rank, beat in beats.items() if not beat.has_ended}

    def _answering(self, beats: Mapping[int, Beat]) -> dict[int, Beat]:
        silent_after_s = _SILENT_AFTER * self._limit_s
        return {rank: b for rank, b in beats.items() if self._silent_s[rank] < silent_after_s}

    def _end(self, beats: Mapping[int, Beat]) -> None:
        """Say who is to blame and leave; what has stopped for good is killed, if it is ours."""
        try:
            answering, me = self._answering(beats), self._mesh.world.rank
            blamed = blame(beats, answering)
            named = blamed[:_RANKS_IN_DETAIL]
            reason = f"no rank has moved for {self._limit_s:g} s (run.hang_timeout_s): " + (
                "; ".join(_describe(rank, beats[rank], rank in answering) for rank in named)
                + (f"; and {len(blamed) - len(named)} more ranks" if blamed != named else "")
            )
            stacks = self._folder.path / "stacks"
            message = (
                f"hang: {reason}\nstacks are in {stacks}\n"
                f"resume with\n  {self._folder.resume_command()}"
            )
            speaks = min(answering) == me
            # Before anything is written to files, which may be what hangs.
            sys.stderr.write(f"[rank {me}] {_describe(me, self._beat, answers=True)}\n")
            if speaks:
                sys.stderr.write(f"{message}\n")
            sys.stderr.flush()
            leave_error(message)
            self._folder.write_hang(EXIT_HANG, reason, speaks=speaks)
            if speaks or me in named:
                _write_stacks(stacks / f"step_{self._beat.step}.rank_{me}.txt")
            for rank in blamed:
                if rank not in answering:
                    _kill_if_stopped(beats[rank])
            time.sleep(_LOOKS_BEFORE_LEAVING * self._interval_s)
        finally:
            os._exit(EXIT_HANG)


def blame(beats: Mapping[int, Beat], answering: Mapping[int, Beat]) -> list[int]:
    """The ranks that the others wait for, or all of them if none stands out."""
    silent = [rank for rank in beats if rank not in answering]
    working = [rank for rank, beat in answering.items() if not beat.is_waiting]
    # A GPU can make the host wait at any line. One at which most ranks stand is such a line.
    line, count = Counter(beat.line for beat in beats.values()).most_common(1)[0]
    apart = [rank for rank in working if 2 * count > len(beats) and beats[rank].line != line]
    first_step = min(beat.step for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.step == first_step]
    return silent or apart or working or behind


def _describe(rank: int, beat: Beat, answers: bool) -> str:
    what = "waits for a file" if beat.is_in_file else "stands still"
    if beat.is_waiting:
        what = "waits for other ranks"
    return (
        f"rank {rank} (host {beat.host}, process {beat.pid}) "
        f"{what if answers else 'has stopped answering, and was last seen'} in {beat.phase}, after "
        f"step {beat.step}, at {beat.line}"
    )


def _path(frame: FrameType) -> Path:
    # Python keeps ".." in the name of a program that was started by such a path.
    return Path(os.path.normpath(frame.f_code.co_filename))


def _is_ours(frame: FrameType) -> bool:
    path = _path(frame)
    return path.is_relative_to(_ROOT) and "site-packages" not in path.parts


def _line(frame: FrameType) -> str:
    path = _path(frame)
    name = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path
    return f"{name}:{frame.f_lineno}"


def _write_stacks(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file)


def _kill_if_stopped(beat: Beat) -> None:
    """Kill a stopped process of our own launcher: it cannot end, and torchrun would wait 30 s."""
    if beat.machine != machine_id():
        return
    with contextlib.suppress(OSError):  # it has ended
        # proc(5): "pid (name) state parent ..."; the name may hold anything.
        state, parent = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[:2]
        if state == "T" and int(parent) == os.getppid():
            os.kill(beat.pid, signal.SIGKILL)
