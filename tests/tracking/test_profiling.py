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
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import record_function

from data.loader import WAITING_FOR_DATA
from parallel import Mesh
from tests.distributed import ONE_RANK, distributed
from tracking.profiling import Profiler, table


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
    assert any("aten::mm" in line and "ms a step" in line for line in said)


def test_the_table() -> None:
    """Own times, the largest first; those of the device where there is one."""
    averages = []
    for name, host_us, device_us in (("step 1", 1000, 0), ("aten::mm", 3000, 50), ("save", 0, 0)):
        average = FunctionEventAvg()
        average.key, average.self_cpu_time_total = name, host_us
        average.self_device_time_total = device_us
        averages.append(average)
    assert table(averages, 2, on_gpu=False) == [
        "      1.5 ms a step  75.0%  aten::mm",
        "      0.5 ms a step  25.0%  step 1",
        "      0.0 ms a step   0.0%  save",
    ]
    assert table(averages, 1, on_gpu=True)[0] == "      0.1 ms a step 100.0%  aten::mm"
