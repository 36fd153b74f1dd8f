"""The profile of a few steps: what it writes, what it says of them, and that nothing is left on."""

import gzip
import json
import logging
import logging.handlers
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from data import WAITING_FOR_DATA
from parallel import Mesh
from tests.distributed import ONE_RANK, distributed
from tracking.profiling import REST, Profiler, table, where_time_went


def trace(path: Path) -> dict[str, Any]:
    """A file as Perfetto reads it."""
    with gzip.open(path, "rt") as file:
        content: dict[str, Any] = json.load(file)
    return content


def names(path: Path) -> Counter[str]:
    """What was recorded, and how often."""
    return Counter(event.get("name", "") for event in trace(path)["traceEvents"])


def work() -> None:
    """A step's: a wait, a product, something elementwise."""
    with record_function(WAITING_FOR_DATA):
        pass
    (torch.ones(32, 32) @ torch.ones(32, 32)).exp()


def break_down_in_step(number: int, profiler: Profiler) -> None:
    with profiler, profiler.step(number):
        work()
        raise RuntimeError("broken")


def is_recording() -> bool:
    return torch._C._autograd._profiler_enabled()


@distributed(ONE_RANK)
def test_it_records_the_steps_asked_for(mesh: Mesh, tmp_path: Path) -> None:
    """And is off before and after them, and for what comes between."""
    with Profiler((3, 4), tmp_path / "profile", mesh) as profiler:
        for number in range(1, 7):
            with profiler.step(number):
                assert is_recording() == (number in (3, 4))
                work()
        assert not is_recording()
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps_3_to_4.rank_0.json.gz"
    seen = names(file)
    assert [seen[f"step {number}"] for number in range(1, 7)] == [0, 0, 1, 1, 0, 0]
    assert (seen["aten::mm"], seen["aten::exp"], seen[WAITING_FOR_DATA]) == (2, 2, 2)


@distributed(ONE_RANK)
def test_a_run_that_ends_before_writes_what_there_is(mesh: Mesh, tmp_path: Path) -> None:
    """Also one that ends by an error, in the middle of a step."""
    profile = tmp_path / "profile"
    with Profiler((3, 100), profile, mesh) as profiler:
        for number in range(2, 5):
            with profiler.step(number):
                work()
    with pytest.raises(RuntimeError, match="broken"):
        break_down_in_step(5, Profiler((5, 6), profile, mesh))
    assert not is_recording()
    assert {file.name for file in profile.iterdir()} == {
        "steps_3_to_4.rank_0.json.gz",
        "steps_5_to_5.rank_0.json.gz",
    }
    assert names(profile / "steps_5_to_5.rank_0.json.gz")["aten::mm"] == 1


@distributed(ONE_RANK)
@pytest.mark.parametrize("steps", [None, (5, 6)])
def test_without_such_steps_there_is_nothing(
    mesh: Mesh, tmp_path: Path, steps: tuple[int, int] | None
) -> None:
    with Profiler(steps, tmp_path / "profile", mesh) as profiler, profiler.step(1):
        work()
    assert list(tmp_path.iterdir()) == []


@distributed(ONE_RANK)
def test_a_trace_that_cannot_be_written_does_not_end_the_run(mesh: Mesh, tmp_path: Path) -> None:
    """It is said, and the table comes all the same."""
    (tmp_path / "profile").write_text("in the way")
    logger, records = logging.getLogger("microtron"), logging.handlers.BufferingHandler(100)
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    with Profiler((1, 1), tmp_path / "profile", mesh) as profiler, profiler.step(1):
        work()
    logger.removeHandler(records)
    said = [record.getMessage() for record in records.buffer]
    assert said[0].startswith("cannot write the trace ")
    assert said[0].endswith("steps_1_to_1.rank_0.json.gz: File exists")
    assert any("products" in line and " mm " in line for line in said)


class Events:
    """Events by hand, each inside the one that `inside` names."""

    def __init__(self) -> None:
        self.all: list[FunctionEvent] = []

    def add(
        self,
        name: str,
        start_us: float,
        end_us: float,
        inside: FunctionEvent | None = None,
        kernel_us: float = 0.0,
        thread: int = 1,
    ) -> FunctionEvent:
        """One of the host's, with the kernels that it launches."""
        event = FunctionEvent(
            len(self.all), name, thread, start_us, end_us, device_type=DeviceType.CPU
        )
        if inside is not None:
            inside.append_cpu_child(event)
            event.set_cpu_parent(inside)
        if kernel_us:
            event.append_kernel(f"kernel of {name}", 0, kernel_us)
        self.all.append(event)
        return event


def two_steps() -> list[FunctionEvent]:
    """2 x 1000 us, of which 500 + 440 have a name; a save between them takes 5000 more."""
    events = Events()
    first = events.add("step 1", 0, 1000)
    events.add(WAITING_FOR_DATA, 0, 50, first)
    linear = events.add("aten::linear", 100, 400, first)
    events.add("aten::addmm", 110, 390, linear, kernel_us=800)
    events.add("aten::_scaled_dot_product_flash_attention_for_cpu", 400, 500, first, kernel_us=90)
    events.add("aten::copy_", 500, 550, first, kernel_us=40)
    events.add("aten::copy_", 2000, 7000)
    second = events.add("step 2", 7000, 8000)
    reduce = events.add("c10d::allreduce_", 7000, 7100, second, kernel_us=100)
    events.add("aten::add", 7010, 7060, reduce)
    update = events.add("Optimizer.step#AdamW.step", 7100, 7350, second)
    events.add("aten::_fused_adamw_", 7110, 7340, update, kernel_us=300)
    events.add("MmBackward", 7400, 7450, second)
    gather = events.add("FSDP::all_gather_copy_out (blocks.1)", 7500, 7530, second)
    events.add("aten::copy_", 7510, 7520, gather)
    events.add("aten::addmm_", 7600, 7610, second)
    return events.all


def test_own_times_on_a_processor_add_up_to_the_steps() -> None:
    """What is called belongs to its caller's kind if that is one of collectives or the update."""
    number, steps_us, spent = where_time_went(two_steps(), on_gpu=False)
    assert (number, steps_us) == (2, 2000)
    assert {kind: times.total() for kind, times in spent.items()} == {
        WAITING_FOR_DATA: 50,
        "products": 300 + 10,
        "attention": 100,
        "elementwise, norms, copies": 50 + 10,
        "communication": 100 + 20,
        "optimizer": 250,
        REST: 1110,  # 1000 - 500, 1000 - 440, and 50 of a function of autograd's
    }
    assert spent["products"] == {"linear": 20, "addmm": 280, "addmm_": 10}
    gather = "FSDP::all_gather_copy_out (blocks.1)"
    assert spent["communication"] == {"c10d::allreduce_": 50, "add": 50, gather: 20}


def test_on_a_gpu_kernels_count_and_the_rest_is_idle() -> None:
    """Backward is on a thread of its own there, and runs on after its host has gone on."""
    events = Events()
    events.all = two_steps()
    events.add("aten::mm", 900, 910, kernel_us=200, thread=2)
    events.add("aten::mm", 5000, 5010, kernel_us=7777, thread=2)  # of no step
    _, steps_us, spent = where_time_went(events.all, on_gpu=True)
    totals = {kind: times.total() for kind, times in spent.items()}
    assert totals["products"] == 1000
    assert totals["optimizer"] == 300
    assert totals[WAITING_FOR_DATA] == 50  # of the host, whose device has nothing to do then
    assert totals[REST] == steps_us - 1000 - 300 - 100 - 90 - 40 - 50


def test_the_table() -> None:
    """The largest first, the rest last; a step's milliseconds, shares, the largest operators."""
    rows = table(two_steps(), on_gpu=False)
    assert next(iter(rows)) == "products"
    assert list(rows)[-1] == REST
    assert rows["products"] == "      0.2 ms a step  15.5%  addmm 14.0%, linear 1.0%, addmm_ 0.5%"
    assert rows[REST].endswith("0.6 ms a step  55.5%  Python 53.0%, MmBackward 2.5%")
