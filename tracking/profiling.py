"""Where the time of a few steps goes: `logging.profile_steps`.

[Note: every rank its own trace]
Every rank records the same steps and writes a file of its own: who waits in one of them has the
reason in another, and a rank that alone recorded would be the one that the others wait for. Rank 0
speaks for all on the console.

[Note: own time]
Operators call operators. What one takes without those that it calls is its own time, so on a
processor own times add up to the step: what no operator takes is Python's and autograd's. On a GPU
it is the time of the kernels that an operator has launched, and what is left is idle.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from configs import os_error_text
from data import WAITING_FOR_DATA
from parallel import WAITING_FOR_RANKS, Mesh, synchronize
from tracking.console import say_facts

logger = logging.getLogger("microtron")

Kinds = tuple[tuple[str, re.Pattern[str]], ...]

REST = "rest"
_STEP = "step "
# What belongs to a kind with all that it calls, and what does so by itself; the first that fits.
_WITH_CALLED: Kinds = (
    ("optimizer", re.compile(r"Optimizer\.")),
    (WAITING_FOR_DATA, re.compile(WAITING_FOR_DATA)),
    ("communication", re.compile(WAITING_FOR_RANKS)),
    ("communication", re.compile(r"(\w*c10d\w*|microtron)::|nccl:|gloo:|record_param_comms")),
)
_BY_ITSELF: Kinds = (
    ("attention", re.compile(r"aten::.*(attention|scaled_dot_product)")),
    ("products", re.compile(r"aten::\w*(mm|matmul|linear|addmv)_?$|aten::_addmm|mkldnn::")),
    # FSDP2 waits inside of these.
    ("communication", re.compile(r"FSDP::(all_gather|post_backward_(reduce|rs_wait))")),
    ("elementwise, norms, copies", re.compile(r"aten::|fsdp::|inductor|triton|.*Compiled")),
)
_NAMED, _LEAST_NAMED = 3, 0.005  # operators of a kind on the console, and their least share


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
            say_facts(table(recorded.events(), on_gpu=self._mesh.device.type == "cuda"))
            logger.info("  each rank's trace is in %s, for ui.perfetto.dev", self._folder)


def where_time_went(
    events: Iterable[FunctionEvent], *, on_gpu: bool
) -> tuple[int, float, dict[str, Counter[str]]]:
    """How many steps, their microseconds, and of each kind those of its operators.

    See [Note: own time].
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    steps = [event for event in on_host if event.name.startswith(_STEP)]
    steps_us = sum(step.time_range.elapsed_us() for step in steps)
    spent: dict[str, Counter[str]] = {}
    # On a GPU backward has a thread of its own; on a processor all is inside the steps.
    tops = _tops(on_host, steps) if on_gpu else steps
    todo = [(event, _match(_WITH_CALLED, event)) for event in tops]
    while todo:
        event, owner = todo.pop()
        kind = owner or _match(_BY_ITSELF, event) or REST
        on_kernels = on_gpu and kind != WAITING_FOR_DATA
        us = sum(k.duration for k in event.kernels) if on_kernels else event.self_cpu_time_total
        spent.setdefault(kind, Counter())[_name(event)] += us
        todo += [(called, owner or _match(_WITH_CALLED, called)) for called in event.cpu_children]
    if on_gpu:
        idle_us = steps_us - sum(map(Counter.total, spent.values()))
        spent.setdefault(REST, Counter())["idle"] = max(0.0, idle_us)  # kernels may overlap
    return len(steps), steps_us, spent


def _tops(on_host: list[FunctionEvent], steps: list[FunctionEvent]) -> list[FunctionEvent]:
    """What no other has called, on any thread, while a step went on."""
    return [
        event
        for event in on_host
        if event.cpu_parent is None
        and any(s.time_range.start <= event.time_range.start <= s.time_range.end for s in steps)
    ]


def _match(kinds: Kinds, event: FunctionEvent) -> str | None:
    return next((kind for kind, names in kinds if names.match(event.name)), None)


def _name(event: FunctionEvent) -> str:
    return "Python" if event.name.startswith(_STEP) else event.name.removeprefix("aten::")


def table(events: Iterable[FunctionEvent], *, on_gpu: bool) -> dict[str, str]:
    """Of each kind: milliseconds a step, the share of the steps, the largest operators in it."""
    number, steps_us, spent = where_time_went(events, on_gpu=on_gpu)
    rows = {}
    for kind in sorted(spent, key=lambda kind: (kind == REST, -spent[kind].total())):
        us = spent[kind].total()
        named = [
            f"{name} {us_of_name / steps_us:.1%}"
            for name, us_of_name in spent[kind].most_common(_NAMED)
            if us_of_name >= _LEAST_NAMED * steps_us
        ]
        row = f"{us / number / 1000:9.1f} ms a step {us / steps_us:6.1%}  {', '.join(named)}"
        rows[kind] = row.rstrip()
    return rows
