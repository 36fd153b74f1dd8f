"""Profiling writes a trace of the requested steps and logs a table."""

import gzip
import json
import logging
import logging.handlers
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from data.loader import WAITING_FOR_DATA
from parallel import Mesh
from tests.distributed import ONE_RANK, distributed
from tracking.profiling import Profiler


def trace(path: Path) -> dict[str, Any]:
    """Read a trace."""
    with gzip.open(path, "rt") as file:
        content: dict[str, Any] = json.load(file)
    return content


def names(path: Path) -> Counter[str]:
    """Count the events of each name."""
    return Counter(event.get("name", "") for event in trace(path)["traceEvents"])


def work() -> None:
    """Stand in for a step: a wait, a matmul, an elementwise operation."""
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
def test_requested_steps_are_recorded(mesh: Mesh, tmp_path: Path) -> None:
    """It records nothing before and after them."""
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
def test_a_run_that_ends_early_writes_what_it_recorded(mesh: Mesh, tmp_path: Path) -> None:
    """Even if it ends with an error in the middle of a step."""
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
def test_without_requested_steps_nothing_is_written(
    mesh: Mesh, tmp_path: Path, steps: tuple[int, int] | None
) -> None:
    with Profiler(steps, tmp_path / "profile", mesh) as profiler, profiler.step(1):
        work()
    assert list(tmp_path.iterdir()) == []


@distributed(ONE_RANK)
def test_a_trace_that_cannot_be_written_is_a_warning(mesh: Mesh, tmp_path: Path) -> None:
    """The table is still logged."""
    (tmp_path / "profile").write_text("in the way")
    logger, records = logging.getLogger("microtron"), logging.handlers.BufferingHandler(100)
    level = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    try:
        with Profiler((1, 1), tmp_path / "profile", mesh) as profiler, profiler.step(1):
            work()
    finally:
        logger.setLevel(level)
        logger.removeHandler(records)
    warning, table, _ = [record.getMessage() for record in records.buffer]
    assert warning.startswith("cannot write the trace ")
    assert warning.endswith("steps_1_to_1.rank_0.json.gz: File exists")
    assert "aten::mm" in table
    assert "Self CPU" in table
