"""Where the time of a few steps goes: `logging.profile_steps`.

[Note: every rank its own trace]
Every rank records the same steps and writes a file of its own: who waits in one of them has the
reason in another, and a rank that alone recorded would be the one that the others wait for. Rank 0
speaks for all on the console.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile, record_function

from configs import os_error_text
from parallel import Mesh, synchronize

logger = logging.getLogger("microtron")

_STEP = "step "
_NUM_NAMED = 12  # operators on the console


class Profiler:
    """Records the first to the last of `steps`; off before and after, and where it is left.

    Writes `steps_A_to_B.rank_R.json.gz`, Chrome's trace format, of those that there were.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, mesh: Mesh) -> None:
        first, last = steps or (0, -1)
        self._wanted = range(first, last + 1)
        self._folder, self._mesh = folder, mesh
        self._profile: profile | None = None
        self._begun: list[int] = []

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._mesh.device.type == "cuda":
            self._profile = None  # a kernel that waits for a lost rank would hold this one too
        self._finish()  # what there is of steps that were to go on

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; they are counted from 1."""
        if number not in self._wanted:
            yield
            return
        if self._profile is None:
            self._start()
        self._begun.append(number)
        with record_function(f"{_STEP}{number}"):
            yield
        if number == self._wanted[-1]:
            self._finish()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()

    def _finish(self) -> None:
        """Stop, write the trace, say where the time went."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        synchronize(self._mesh.device)
        recorded.stop()
        steps = f"steps_{self._begun[0]}_to_{self._begun[-1]}"
        path = self._folder / f"{steps}.rank_{self._mesh.world.rank}.json.gz"
        temporary = path.with_name(f".{path.name}")
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(temporary))
            temporary.rename(path)
        except OSError as error:  # it costs the trace alone, as with a checkpoint
            logger.warning("cannot write the trace %s: %s", path, os_error_text(error))
        if self._mesh.world.rank == 0:
            logger.info("%s", f"profile of {steps.replace('_', ' ')}, on rank 0")
            on_gpu = self._mesh.device.type == "cuda"
            for row in table(recorded.key_averages(), len(self._begun), on_gpu=on_gpu):
                logger.info("%s", row)
            logger.info("  each rank's trace is in %s, for ui.perfetto.dev", self._folder)


def table(averages: Sequence[FunctionEventAvg], num_steps: int, *, on_gpu: bool) -> list[str]:
    """The operators that take most by themselves: milliseconds a step, share of all, name."""
    own_us = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    total_us = sum(map(own_us, averages)) or 1.0
    return [
        f"{own_us(operator) / num_steps / 1000:9.1f} ms a step "
        f"{own_us(operator) / total_us:6.1%}  {operator.key}"
        for operator in sorted(averages, key=own_us, reverse=True)[:_NUM_NAMED]
    ]
