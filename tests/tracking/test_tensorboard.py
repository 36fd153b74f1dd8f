"""TensorBoard: a resumed run is one curve, and `make dashboard` finds it."""

import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.lines import ROOT
from tracking.tensorboard_writer import TensorBoardWriter


def launch(directory: Path, steps: range, shift: float = 0.0) -> TensorBoardWriter:
    """Log these steps, and an evaluation with a sample at every third one."""
    writer = TensorBoardWriter(directory, steps.start)
    for step in steps:
        writer.log({"step": step, "tokens": 9, "time_s": 100.0 + step, "train/loss": step + shift})
        if step % 3 == 0:
            writer.log({"step": step, "time_s": 200.0, "eval/loss": 5.0})
            writer.log({"step": step, "time_s": 200.0, "sample": "def f():\n  <b>"})
    return writer


def test_a_resume_shows_each_step_once(tmp_path: Path) -> None:
    """Killed after step 7 and resumed at step 5, here in one process, as in a rollback."""
    launch(tmp_path, range(1, 8)).writer.flush()
    launch(tmp_path, range(5, 10), shift=0.5).finish(failed=False)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/loss"]
    expected = [*((step, step) for step in range(1, 5)), *((s, s + 0.5) for s in range(5, 10))]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected
    assert [event.wall_time - event.step for event in events.Scalars("train/loss")] == 9 * [100.0]
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6, 9]
    server_events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    samples = server_events.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [3, 6, 9]
    assert samples[0].tensor_proto.string_val[0].decode() == "    def f():\n      <b>\n"


@pytest.mark.slow
def test_tensorflow_is_not_imported() -> None:
    program = (
        "import sys, torch.utils.tensorboard as t; t.SummaryWriter; "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_make_dashboard_serves_the_runs_on_this_machine_only() -> None:
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "-o",
        "setup",
        "dashboard",
        "ARGS=--logdir=other",
    ]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "tensorboard --host localhost" in printed
    assert printed.rstrip().endswith("--logdir runs --logdir=other")
