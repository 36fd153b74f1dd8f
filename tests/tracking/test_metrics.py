"""The rows of metrics.jsonl, their truncation on resume, and MFU."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from configs import Config, parse_config
from model import flops_per_token, num_parameters
from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, distributed
from tracking.metrics import JsonLines, RunLog, truncate_rows
from tracking.tensorboard_writer import TensorBoardWriter
from training.hardware import peak_flops_per_second
from training.state import RunState, StepResult


def test_a_resume_truncates_the_file_at_its_step(tmp_path: Path) -> None:
    """Remove rows after the checkpoint and an incomplete last line; keep the rest as it is."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "train/loss": 0.1}, {"step": 2}, {"step": 2, "eval/loss": 0.3}, {"step": 3}]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines) + '{"step": 4, "tr')
    truncate_rows(path, 2)
    assert path.read_text() == "".join(lines[:3])
    truncate_rows(path, 0)
    assert path.read_text() == ""


def test_a_line_that_a_crash_of_the_machine_has_damaged_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file and number are named; it is removed, as half a line is at the end of the file."""
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    path = tmp_path / "metrics.jsonl"
    damaged = (bytes(9), b"7", b"{}", b"\xff")
    lines = [b'{"step": 1}', *damaged, b'{"step": 2}', b'{"step": 3}']
    path.write_bytes(b"\n".join(lines))
    assert truncate_rows(path, 2) == {"step": 2}
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    removed = [n for n in range(1, 8) if f"{path}: removing line {n}," in caplog.text]
    assert removed == [2, 3, 4, 5]


def opening_on(disk: dict[str, int]) -> Callable[..., contextlib.AbstractContextManager[Any]]:
    """Path.open on a disk with `room` for so many more bytes, of a file that may write a part."""
    original = Path.open

    @contextlib.contextmanager
    def opened(path: Path, mode: str, buffering: int) -> Iterator[SimpleNamespace]:
        with original(path, mode, buffering) as file:

            def write(content: bytearray) -> int:
                if not disk["room"]:
                    raise OSError(28, "No space left on device")
                part = content[: disk["room"]]
                disk["room"] -= len(part)
                return int(file.write(part))

            yield SimpleNamespace(write=write)

    return opened


def test_lines_that_a_full_disk_refuses_are_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order, although the disk took half a line first. One warning names the file."""
    path, disk = tmp_path / "metrics.jsonl", {"room": 20}
    lines = JsonLines(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening_on(disk))
        for step in range(4):
            lines.write({"step": step, "loss": None})
        assert path.stat().st_size == 20
        disk["room"] = 90
        lines.write({"step": 4, "loss": None})
        assert path.stat().st_size == 110
        disk["room"] = 1000
        lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert caplog.messages == [
        f"cannot write {path}: No space left on device; training continues, and its lines are "
        "tried again"
    ]


def test_a_disk_that_stays_full_loses_lines_but_raises_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end says how many. A resume truncates in place, so it needs no room."""
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening_on({"room": 17}))
        for step in range(3):
            lines.write({"step": step})
        lines.close()
    assert caplog.messages[1:] == [f"{path}: the last 2 lines are lost"]
    assert path.read_bytes() == b'{"step": 0}\n{"ste'
    assert truncate_rows(path, 2) == {"step": 0}
    assert path.read_bytes() == b'{"step": 0}\n'
    missing = JsonLines(tmp_path / "missing" / "metrics.jsonl")
    missing.write({"step": 0})
    missing.close()


def config_of_run(*overrides: str) -> Config:
    return parse_config(["config=gpt_debug.yaml", "logging.wandb=disabled", *overrides])


def mfus_of(config: Config, mesh: Mesh, path: Path, *results: StepResult) -> list[float]:
    """Log these steps; rank r has a peak of 1e9 (r + 1) FLOP/s."""
    folder = SimpleNamespace(metrics=path / "metrics.jsonl", samples=path / "samples", path=path)
    run: Any = SimpleNamespace(config=config, mesh=mesh, folder=folder)
    peak = 1e9 * (1 + mesh.world.rank)
    with (
        mock.patch("tracking.metrics.peak_flops_per_second", return_value=peak),
        RunLog(run, RunState(wandb_id="")) as log,
    ):
        for step, result in enumerate(results, start=1):
            log.step(RunState(wandb_id="", step=step), result)
    if mesh.world.rank:
        return []
    rows = map(json.loads, folder.metrics.read_text().splitlines())
    return [row["speed/mfu"] for row in rows]


def step_of(num_targets: int, mean_row_length: float, elapsed_s: float) -> StepResult:
    return StepResult(1.0, 0.0, 1.0, 1e-3, num_targets, mean_row_length, elapsed_s, None)


@distributed(ONE_RANK)
def test_a_view_whose_disk_is_full_does_not_stop_training(mesh: Mesh, tmp_path: Path) -> None:
    """The disk is full at a write or at close; metrics.jsonl has every row."""
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    steps = [step_of(100, 10.0, 1.0)] * 2
    for method in ("__init__", "log", "finish"):
        (tmp_path / method).mkdir()
        with mock.patch.object(TensorBoardWriter, method, full):
            assert len(mfus_of(config_of_run(), mesh, tmp_path / method, *steps)) == 2
    assert full.call_count == 3  # dropped after the first failure


@distributed(ONE_RANK)
def test_tensorboard_may_be_missing(mesh: Mesh, tmp_path: Path) -> None:
    """It is one warning, and metrics.jsonl has every row."""
    loaded = [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]
    with (
        mock.patch.dict(sys.modules, dict.fromkeys([*loaded, "tensorboard"])),
        mock.patch("tracking.metrics.logger.warning") as warn,
    ):
        assert len(mfus_of(config_of_run(), mesh, tmp_path, step_of(100, 10.0, 1.0))) == 1
    assert warn.call_count == 1
    assert "training continues without it" in warn.call_args.args[0]


@distributed(Layout(dp=2), Layout(tp=2, dp=2))
def test_mfu_is_relative_to_the_peak_of_all_ranks(mesh: Mesh, tmp_path: Path) -> None:
    """The peak is the sum over ranks, or the best step if that is faster."""
    config = config_of_run()
    model, vocab_size = config.model, config.data.vocab_size
    size = mesh.world.size
    peak = 1e9 * size * (size + 1) / 2
    flops = 1000 * flops_per_token(model, vocab_size, 17)
    steps = [step_of(1000, 17, flops / peak / mfu) for mfu in (0.25, 1.24, 0.62)]
    mfus = mfus_of(config, mesh, tmp_path, *steps)
    if mesh.world.rank == 0:
        assert mfus == pytest.approx([0.25, 1.0, 0.5])


def test_attention_flops_depend_on_document_length() -> None:
    """Documents of 17 tokens at s = 2048, h = 64; a full row takes 5.2 times as many FLOPs."""
    config = config_of_run(
        "model.hidden_size=64", "model.seq_length=2048", "model.num_layers=2", "data.vocab_size=331"
    )
    model, vocab_size = config.model, config.data.vocab_size
    positions = 2048 * 64
    weights = num_parameters(model, vocab_size) - positions
    vectors = 2 * (4 + 5 + 4) * 64 + 2 * 64  # biases of attention and mlp, and norms
    expected = 6 * (weights - vectors) + 12 * 2 * 64 * 17
    assert flops_per_token(model, vocab_size, 17) == expected
    assert flops_per_token(model, vocab_size) / expected == pytest.approx(5.2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", 2 * 8192**3 / 0.25),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 2 * 8192**3 / 0.25),
    ],
)
def test_gpus_are_recognised_by_their_full_name(name: str, rate: float) -> None:
    """Other GPUs and MIG slices are measured."""
    with (
        mock.patch("torch.cuda.get_device_name", return_value=name),
        mock.patch("torch.ones", return_value=torch.zeros(1, dtype=torch.bfloat16)),
        mock.patch("training.hardware._seconds_of_product", side_effect=[9.0, 0.5, 0.25, 0.3, 0.4]),
    ):
        assert peak_flops_per_second(torch.device("cuda"), "bf16") == rate
