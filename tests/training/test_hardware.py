"""The precision of bf16 on CPUs is chosen once per processor model, and a run keeps it."""

import json
import logging.handlers
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoints import Checkpoint
from checkpoints.manifest import read_manifest
from configs import Config, flatten, parse_config
from ops.matmul import Choice, Precision, use_precision
from ops.processor import Processor, processor
from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, distributed
from tests.lines import ROOT
from tests.runs import rows, settings, train_on
from training import hardware
from training.hardware import (
    choose_precision,
    fastest_precision,
    hardware_record,
    report_other_hardware,
)

FIRST, SECOND = Precision("native", "widened"), Precision("widened", "native")
BF16 = ("train.precision=bf16", "evaluate.interval=0", "checkpoint.save_interval=3")


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Precision]:
    """The results of the next measurements, on a processor without a rule."""
    results = [FIRST, SECOND]
    monkeypatch.setattr(hardware, "measure_precision", lambda: results.pop(0))
    monkeypatch.setattr(hardware, "processor", lambda: Processor("a CPU", "", frozenset()))
    return results


def test_a_processor_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measurements: list[Precision]
) -> None:
    """Measure once per name, torch version and number of threads, and never if known."""
    assert [fastest_precision(f"{tmp_path}/cache") for _ in range(2)] == [FIRST, FIRST]
    (key,) = json.loads((tmp_path / "cache" / "processors.json").read_text())
    assert key == f"a CPU, torch {torch.__version__}, {torch.get_num_threads()} threads"
    another = Processor("another", "", frozenset())
    monkeypatch.setattr(hardware, "processor", lambda: another)
    assert [fastest_precision(f"{tmp_path}/cache") for _ in range(2)] == [SECOND, SECOND]
    monkeypatch.setattr(hardware, "processor", lambda: Processor("", "", frozenset({"amx_bf16"})))
    assert fastest_precision(f"{tmp_path}/unused") == Precision("native", "native")
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"KEY": 1}',
        b'{"KEY": {"matmul": "native"}}',
        b'{"KEY": {"matmul": "fast", "attention": "native"}}',
    ],
)
@pytest.mark.usefixtures("measurements")
def test_a_damaged_file_is_measured_again(tmp_path: Path, content: bytes) -> None:
    path, key = tmp_path / "processors.json", f"a CPU, torch {torch.__version__}, "
    key += f"{torch.get_num_threads()} threads"
    path.write_bytes(content.replace(b"KEY", key.encode()))
    assert [fastest_precision(str(tmp_path)) for _ in range(2)] == [FIRST, FIRST]
    assert list(json.loads(path.read_text())) == [key]


@pytest.mark.usefixtures("measurements")
def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert fastest_precision(f"{tmp_path}/file") == FIRST
    assert "cannot store which precision is faster" in caplog.text


PROGRAM = """
import sys, time
from pathlib import Path
from ops.matmul import Precision
from training import hardware

def measure():
    with Path(sys.argv[1], "log").open("a") as log:
        log.write("measured\\n")
    time.sleep(1)
    return Precision("native", sys.argv[2])

hardware.measure_precision = measure
hardware.known_choice = lambda _: None
print(hardware.fastest_precision(sys.argv[1]).attention)
"""


@pytest.mark.slow
def test_two_processes_measure_once(tmp_path: Path) -> None:
    """The second waits for the first and reads its result."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), choice],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
        for choice in ("native", "widened")
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert printed[0] == printed[1] != ""
    assert (tmp_path / "log").read_text() == "measured\n"


def log_of(action: Callable[[], object]) -> list[str]:
    """The lines that an action logs on this rank of the pool."""
    handler = logging.handlers.BufferingHandler(100)
    hardware.logger.addHandler(handler)
    action()
    hardware.logger.removeHandler(handler)
    return [record.getMessage() for record in handler.buffer]


def debug_config(*overrides: str) -> Config:
    return parse_config(["config=gpt_debug.yaml", "train.precision=bf16", *overrides])


def checkpoint_of(config: Config, **state: Any) -> Checkpoint:
    state = {"data_fingerprint": "x", "config": flatten(config), **state}
    return Checkpoint(Path("step_00000005"), 5, state, {}, {})


def test_cached_files_do_not_fill_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system frees them when memory is needed; without memory.stat all counts as used."""
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    assert hardware._container_memory() is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert hardware._container_memory() == (1000, 900)
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 300\n")
    assert hardware._container_memory() == (1000, 400)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_gib_on_every_system(
    monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    """The system reports KiB on Linux and bytes on macOS."""
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr(hardware.resource, "getrusage", lambda _: usage)
    monkeypatch.setattr(hardware.sys, "platform", platform)
    assert hardware.peak_memory_gib(torch.device("cpu")) == 3.0


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
def test_all_ranks_use_the_precision_of_rank_0(mesh: Mesh) -> None:
    """One line reports different processors. In fp32 nothing is chosen."""
    rank, config = mesh.world.rank, debug_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "processor", lambda: Processor(f"CPU {rank}", "", frozenset()))
        patch.setattr(hardware, "fastest_precision", lambda _: [FIRST, SECOND][rank])
        previous = use_precision(SECOND)
        assert choose_precision(debug_config("train.precision=fp32"), mesh) is None
        lines = log_of(lambda: choose_precision(config, mesh))
        assert use_precision(previous) == FIRST
    assert len(lines) == (rank == 0 and mesh.world.size > 1)
    assert all("(CPU 0, CPU 1); all use the precision of rank 0's" in line for line in lines)


@distributed(ONE_RANK)
def test_a_checkpoint_keeps_its_precision(mesh: Mesh) -> None:
    """Without one in its manifest: widened on x86 without AMX, if it was trained in bf16."""
    config, fp32 = debug_config(), debug_config("train.precision=fp32")
    newest = {"matmul_precision": "widened", "attention_precision": "native"}
    not_needed = dict.fromkeys(newest)
    zen_4 = Processor("Zen 4", "AuthenticAMD", frozenset({"avx512_bf16"}))
    cases = [
        (checkpoint_of(config, **newest), SECOND),
        (checkpoint_of(fp32, **newest), SECOND),
        (checkpoint_of(config), Precision("widened", "widened")),
        (None, Precision("native", "native")),
        (checkpoint_of(fp32, **not_needed), Precision("native", "native")),
        (checkpoint_of(fp32), Precision("native", "native")),
        (checkpoint_of(config, data_fingerprint=None), Precision("native", "native")),  # imported
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "x86_64")
        patch.setattr(hardware, "processor", lambda: zen_4)
        previous = use_precision(FIRST)
        for checkpoint, expected in cases:
            assert choose_precision(config, mesh, checkpoint) == expected
            assert use_precision(FIRST) == expected
        use_precision(previous)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_resume_on_other_hardware_is_reported_in_one_line(mesh: Mesh) -> None:
    now, config = hardware_record(mesh, FIRST), debug_config()
    assert now["threads_per_rank"] == 1
    for state in (now, {}):  # the same; older than the record
        same = checkpoint_of(config, **state)
        assert log_of(lambda same=same: report_other_hardware(mesh, same)) == []  # type: ignore[misc]
    other = checkpoint_of(config, **{**now, "processor": "abacus", "threads_per_rank": 7})
    lines = log_of(lambda: report_other_hardware(mesh, other))
    assert len(lines) == (mesh.world.rank == 0)
    for line in lines:
        assert f"processor={now['processor']} (was abacus), threads_per_rank=1 (was 7)" in line


@pytest.mark.parametrize("kept", ["native", "widened"])
def test_a_resume_repeats_bit_for_bit_in_its_precision(
    corpus: Path, tmp_path: Path, kept: Choice
) -> None:
    """Even on a processor where the other precision is faster."""
    other: Choice = "widened" if kept == "native" else "native"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_on(ONE_RANK, settings(corpus, whole, *BF16), fastest=kept)
    train_on(ONE_RANK, settings(corpus, parts, *BF16, "run.stop_at_step=3"), fastest=kept)
    train_on(ONE_RANK, settings(corpus, parts, *BF16), fastest=other)
    assert rows(parts) == rows(whole)
    state = read_manifest(parts / "test" / "checkpoints" / "step_00000006").state
    assert state["matmul_precision"] == state["attention_precision"] == kept
    assert (state["processor"], state["threads_per_rank"]) == (processor().name, 1)
    train_on(ONE_RANK, settings(corpus, tmp_path / "other", *BF16), fastest=other)
    assert rows(tmp_path / "other") != rows(whole)
