"""Profile a few steps with torch.profiler (`logging.profile_steps`).

Every rank writes its own trace, because the cause of a wait on one rank is in the trace of another.
Rank 0 logs a table of its own operators.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from configs import os_error_text
from parallel import Mesh, synchronize

logger = logging.getLogger("microtron")

_NUM_OPERATORS = 12  # in the table


class Profiler:
    """Records steps A to B in `steps_A_to_B.rank_R.json.gz`, or fewer if training ends early."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path, mesh: Mesh) -> None:
        first, last = steps or (0, -1)
        self._steps = range(first, last + 1)
        self._folder, self._mesh = folder, mesh
        self._profile: profile | None = None
        self._recorded: list[int] = []

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._mesh.device.type == "cuda":
            self._profile = None  # a kernel that waits for a lost rank would block this one too
        self._finish()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record the step with this number, counted from 1, if it was requested."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            gpu = [ProfilerActivity.CUDA] if self._mesh.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
        self._recorded.append(number)
        with record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self._finish()

    def _finish(self) -> None:
        """Stop recording, write the trace and log the table."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        synchronize(self._mesh.device)
        recorded.stop()
        first, last = self._recorded[0], self._recorded[-1]
        path = self._folder / f"steps_{first}_to_{last}.rank_{self._mesh.world.rank}.json.gz"
        temporary = path.with_name(f".{path.name}")
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(temporary))
            temporary.rename(path)
        except OSError as error:  # training continues without the trace
            logger.warning("cannot write the trace %s: %s", path, os_error_text(error))
        if self._mesh.world.rank == 0:
            by = f"self_{'cpu' if self._mesh.device.type == 'cpu' else 'device'}_time_total"
            table = recorded.key_averages().table(by, _NUM_OPERATORS, max_name_column_width=40)
            logger.info("profile of steps %d to %d on rank 0:\n%s", first, last, table)
            logger.info("open the traces of all ranks, in %s, at ui.perfetto.dev", self._folder)
