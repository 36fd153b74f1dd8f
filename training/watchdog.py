"""The watchdog: detects a hung run, names the stuck rank, and ends all ranks with exit code 75.

A thread samples the main thread's stack; an unchanged stack in the same step means no progress.
Ranks exchange this through `parallel.Heartbeats`. The run hangs when none of the ranks that still
answer has made progress for `run.hang_timeout_s`. Each rank then prints one line and exits. The
lowest rank that answers writes exit.json; it and the blamed ranks write their stacks to `stacks/`.
Waiting for checkpoint files may take `run.file_timeout_s`, with a warning per hang timeout.

No thread can sample while C code holds the GIL. Then faulthandler's timer, restarted at each
sample, prints the stacks and ends the process.
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
from types import FrameType
from typing import Any

from checkpoints import is_file_access
from configs import leave_error
from parallel import Heartbeats, is_blocking_frame, is_transport_frame, machine_id
from training.state import Run

logger = logging.getLogger("microtron")

EXIT_HANG = 75
_SAMPLES_PER_LIMIT, _LONGEST_INTERVAL_S = 20, 5.0
_INTERVALS_BEFORE_EXIT = 2  # for the other ranks to reach the same verdict
_SILENT_AFTER, _BACKSTOP_AFTER = 0.5, 1.5  # of the limit
_RANKS_IN_DETAIL = 8  # the report names at most this many, and they leave their stacks
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Beat:
    """What a rank reports of itself."""

    host: str
    machine: str
    pid: int
    samples: int = 0  # so far, so that every beat of a running process differs
    step: int = 0  # finished steps
    phase: str = ""  # the function that train.py has called
    line: str = ""  # the innermost line of ours, outside the functions that wait
    is_waiting: bool = False  # for other ranks, or a device that may wait for them
    is_in_file: bool = False  # waiting for a file of a checkpoint
    stuck: float = 0.0  # time without progress, as a fraction of the limit
    has_ended: bool = False


class Watchdog:
    """Watches a run from `begin` to the end of a `with`."""

    def __init__(self, run: Run) -> None:
        self._folder, self._mesh = run.folder, run.mesh
        self._limit_s = run.config.run.hang_timeout_s  # 0: off
        self._file_limit_s = run.config.run.file_timeout_s
        self._interval_s = min(self._limit_s / _SAMPLES_PER_LIMIT, _LONGEST_INTERVAL_S)
        self._beat = Beat(socket.gethostname(), machine_id(), os.getpid())
        self._position: object = None
        self._silent_s: dict[int, float] = {}
        self._beats: dict[int, Beat] = {}
        self._left = threading.Event()
        self._heartbeats: Heartbeats | None = None

    def __enter__(self) -> "Watchdog":
        return self

    def begin(self) -> None:
        """Watch from now on, unless this is so already."""
        if self._limit_s > 0 and self._heartbeats is None:
            frame = sys._getframe(1)
            self._story = frame.f_code.co_filename
            step, line = self._folder.step or 0, _own_line(frame) or ""
            self._beat = replace(self._beat, step=step, phase=frame.f_code.co_name, line=line)
            self._heartbeats = Heartbeats(self._mesh, self._interval_s)
            # At once: this rank may stop before its first sample.
            self._heartbeats.publish(asdict(self._beat))
            self._restart_backstop()
            self._thread = threading.Thread(
                target=self._watch, args=(self._heartbeats,), name="watchdog", daemon=True
            )
            self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        if self._heartbeats is not None:
            self._left.set()
            self._thread.join()
            # The others may be waiting for a rank that leaves with an error.
            self._heartbeats.publish(asdict(self._beat) | {"has_ended": kind is None})
            self._heartbeats.close()

    def _watch(self, heartbeats: Heartbeats) -> None:
        sampled_at = time.monotonic()
        try:
            while not self._left.wait(self._interval_s):
                self._restart_backstop()
                now = time.monotonic()
                # Do not count time during which this process was stopped.
                seen_s = min(now - sampled_at, 2 * self._interval_s)
                sampled_at = now
                self._sample(seen_s)
                heartbeats.publish(asdict(self._beat))
                self._read_board(heartbeats.board, seen_s)
                beats = {rank: beat for rank, beat in self._beats.items() if not beat.has_ended}
                silent_after_s = _SILENT_AFTER * self._limit_s
                answering = {r: b for r, b in beats.items() if self._silent_s[r] < silent_after_s}
                if all(beat.stuck >= 1 for beat in answering.values()):
                    self._end(beats, answering)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _restart_backstop(self) -> None:
        faulthandler.dump_traceback_later(_BACKSTOP_AFTER * self._limit_s, exit=True)

    def _sample(self, seen_s: float) -> None:
        """Sample the main thread into this rank's next beat."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        frames: list[FrameType] = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        # The shared-memory transport polls on several lines; treat them as one.
        inside = [number for number, frame in enumerate(frames) if is_transport_frame(frame.f_code)]
        del frames[: max(inside, default=-1) + 1]
        before, step = self._beat, self._folder.step or 0
        position = (step, [(frame.f_code, frame.f_lineno) for frame in frames])
        own = next((number for number, frame in enumerate(frames) if _own_line(frame)), 0)
        blocks = is_blocking_frame(frames[own].f_code)
        calls = [frame.f_code for frame in frames]
        story = next((n for n, code in enumerate(calls) if code.co_filename == self._story), 0)
        in_torch = any("torch/distributed" in code.co_filename for code in calls[:own])
        self._beat = beat = replace(
            before,
            samples=before.samples + 1,
            step=step,
            phase=calls[max(story - 1, 0)].co_qualname,
            line=_own_line(frames[own + blocks]) or calls[own + blocks].co_filename,
            is_waiting=blocks or in_torch,
            is_in_file=any(is_file_access(code) for code in calls),
            stuck=0.0,
        )
        if position == self._position:
            in_file = beat.is_in_file and not beat.is_waiting
            limit_s = self._file_limit_s if in_file else self._limit_s
            self._beat = replace(beat, stuck=before.stuck + seen_s / limit_s)
            waited_s, waited_before_s = self._beat.stuck * limit_s, before.stuck * limit_s
            if in_file and waited_s // self._limit_s > waited_before_s // self._limit_s:
                message = "step %d: waiting for a file for %.0f s, at %s; the run ends after %.0f s"
                logger.warning(message, step, waited_s, beat.line, limit_s)
        self._position = position

    def _read_board(self, board: Mapping[int, Any], seen_s: float) -> None:
        """Read the beats of all ranks, and count for how long each has been silent."""
        beats = {rank: Beat(**beat) for rank, beat in board.items()}
        beats[self._mesh.world.rank] = self._beat
        for rank, beat in beats.items():
            is_new = beat != self._beats.get(rank)
            self._silent_s[rank] = 0.0 if is_new else self._silent_s[rank] + seen_s
        self._beats = beats

    def _end(self, beats: Mapping[int, Beat], answering: Mapping[int, Beat]) -> None:
        """Report the blamed ranks and exit; kill those that are stopped for good.

        A rank that only cleans up exits with the code of how the launch ended.
        """
        code = EXIT_HANG
        try:
            if self._folder.exit_code is not None:
                code = self._folder.exit_code
                return
            me, blamed = self._mesh.world.rank, blame(beats, answering)
            named = blamed[:_RANKS_IN_DETAIL]
            reason = f"no rank has made progress for {self._limit_s:g} s (run.hang_timeout_s): " + (
                "; ".join(_describe(rank, beats[rank], rank in answering) for rank in named)
                + (f"; and {len(blamed) - len(named)} more ranks" if blamed != named else "")
            )
            stacks = self._folder.path / "stacks"
            resume = f"resume with\n  {self._folder.resume_command()}"
            message = f"hang: {reason}\nstacks are in {stacks}\n{resume}"
            speaks = min(answering) == me
            # Print before writing to files, which may be what hangs.
            sys.stderr.write(f"[rank {me}] {_describe(me, self._beat, answers=True)}\n")
            if speaks:
                sys.stderr.write(f"{message}\n")
            sys.stderr.flush()
            leave_error(message)
            self._folder.write_hang(EXIT_HANG, reason, speaks=speaks)
            if speaks or me in named:
                stacks.mkdir(exist_ok=True)
                with (stacks / f"step_{self._beat.step}.rank_{me}.txt").open("w") as file:
                    faulthandler.dump_traceback(file)
            # Until the others have found the hang too: to them, a killed rank is a lost connection.
            time.sleep(_INTERVALS_BEFORE_EXIT * self._interval_s)
            for rank in blamed:
                if rank not in answering:
                    _kill_if_stopped(beats[rank])
        finally:
            os._exit(code)


def blame(beats: Mapping[int, Beat], answering: Mapping[int, Beat]) -> list[int]:
    """The ranks that the others wait for, or all if none stands out."""
    silent = [rank for rank in beats if rank not in answering]
    working = [rank for rank, beat in answering.items() if not beat.is_waiting]
    # A GPU can make the host wait at any line; so probably at one that most ranks are at.
    line, count = Counter(beat.line for beat in beats.values()).most_common(1)[0]
    apart = [rank for rank in working if 2 * count > len(beats) and beats[rank].line != line]
    first_step = min(beat.step for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.step == first_step]
    return silent or apart or working or behind


def _describe(rank: int, beat: Beat, answers: bool) -> str:
    if not answers:
        what = "has stopped answering, and was last seen"
    elif beat.is_waiting:
        what = "waits for other ranks"
    else:
        what = "waits for a file" if beat.is_in_file else "makes no progress"
    return (
        f"rank {rank} (host {beat.host}, process {beat.pid}) {what} in {beat.phase}, after step "
        f"{beat.step}, at {beat.line}"
    )


def _own_line(frame: FrameType) -> str | None:
    """The file and line of a frame in this repository; None elsewhere."""
    path = Path(os.path.normpath(frame.f_code.co_filename))  # a program's path may contain ".."
    if path.is_relative_to(_ROOT) and "site-packages" not in path.parts:
        return f"{path.relative_to(_ROOT)}:{frame.f_lineno}"
    return None


def _kill_if_stopped(beat: Beat) -> None:
    """Kill a suspended process of our launcher, for which torchrun would wait 30 s."""
    if beat.machine != machine_id():
        return
    with contextlib.suppress(OSError):  # it has ended
        # proc(5): "pid (name) state parent ..."; the name may contain anything.
        state, parent = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[:2]
        if state == "T" and int(parent) == os.getppid():
            os.kill(beat.pid, signal.SIGKILL)
