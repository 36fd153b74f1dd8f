"""Repeated failures that a run survives; short here, long in `make drills` (mark `drill`)."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs import parse_config
from parallel import Mesh
from tests.checkpoints.test_checkpoints import plant_foreign_entries
from tests.distributed import ONE_RANK, Layout, distributed
from tests.lines import ROOT
from tests.runs import LONG, finish, rows, settings, start, steps_done, train_on, wait_for
from tests.training.test_divergence import poisoned, run, steps_saved
from tests.training.test_signals import is_in, slow_down

# Every TP x DP out of {1, 2, 4} on four ranks at most.
GRIDS = [Layout(tp=tp, dp=dp) for tp in (1, 2, 4) for dp in (1, 2, 4) if tp * dp <= 4]


def at_length(number: int) -> object:
    """A parameter that takes minutes."""
    return pytest.param(number, marks=[pytest.mark.drill, pytest.mark.timeout(3600)])


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [6, at_length(200)])
def test_every_kill_is_survived_bit_for_bit(num_kills: int) -> None:
    """See kill_fuzz.py. At least a quarter of the kills hit a save."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.kill_fuzz", str(num_kills)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    words = ended.stdout.split()
    assert words[:3] == [str(num_kills), "of", str(num_kills)]
    assert int(words[words.index("inside") - 3]) >= num_kills // 4


@pytest.mark.parametrize("num_changes", [3, at_length(20)])
def test_a_run_moves_from_layout_to_layout(corpus: Path, tmp_path: Path, num_changes: int) -> None:
    """One step on each random grid, with dropout: the curve is within 1e-5 of one process's.

    Micro-batches change too.
    """
    last = num_changes + 1
    common = (f"train.train_steps={last}", "evaluate.interval=0", "optimizer.lr=3e-3")
    train_on(ONE_RANK, settings(corpus, tmp_path, *common, "run.name=whole"))
    choose, layout = random.Random(num_changes), ONE_RANK
    for step in range(1, last + 1):
        layout = choose.choice([other for other in GRIDS if other != layout])
        overrides = (
            "run.name=moved",
            f"run.stop_at_step={step}",
            f"train.micro_batch_size={choose.choice([1, 2])}",
        )
        train_on(layout, settings(corpus, tmp_path, *common, *overrides))
    moved, whole = rows(tmp_path, "moved"), rows(tmp_path, "whole")
    assert [row["step"] for row in moved] == list(range(1, last + 1))
    for row, expected in zip(moved, whole, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5), row["step"]


@pytest.mark.drill
@distributed(ONE_RANK, Layout(tp=2))
def test_stopped_anywhere_near_bad_steps(mesh: Mesh, corpus: Path, tmp_path: Path) -> None:
    """Steps 3, 4, 5 and 8 are bad: each stop saves its step, and does not change the curve.

    One consecutive bad step is allowed, checkpoint.keep=1, and there is a rollback on the way.
    """
    last = 10
    overrides = ("evaluate.interval=0", "train.max_consecutive_skips=1", "checkpoint.keep=1")
    overrides += ("checkpoint.save_interval=2", f"train.train_steps={last}")
    config = parse_config(settings(corpus, tmp_path, *overrides))
    samples = {*range(16, 40), *range(64, 72)}
    with poisoned(mesh, samples):
        whole = run(mesh, config, name="whole")
        for stop in range(1, last):
            name = f"stopped_{stop}"
            run(mesh, config, name=name, stop_at_step=stop)
            assert steps_saved(tmp_path / name / "checkpoints")[-1] == stop
            assert run(mesh, config, name=name) == whole, stop
        for step in range(1, last + 1):  # one run stops at every step
            assert run(mesh, config, name="often", stop_at_step=step)[-1]["step"] == step
    assert rows(tmp_path, "often") == whole


@pytest.mark.drill
def test_a_folder_that_ranks_do_not_share_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a relative run.directory and rank 1 in another working directory, as on another host."""
    (tmp_path / "inject").mkdir()
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    program = f"import os; 'RANK' in os.environ and os.chdir('{tmp_path}/' + os.environ['RANK'])"
    (tmp_path / "inject" / "sitecustomize.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "inject"))
    output = finish(start(2, settings(corpus, Path("runs"))), expected=1)
    assert "run.directory=runs is not shared by all ranks: ranks [1] on " in output
    assert "exitcode  : 2" in output
    assert not (tmp_path / "1" / "runs").exists()
    assert not (tmp_path / "0" / "runs" / "test" / "exit.json").exists()


@pytest.mark.drill
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_among_foreign_entries(corpus: Path, tmp_path: Path, ranks: int) -> None:
    """It trains, prunes and resumes, and leaves them alone."""
    checkpoints = tmp_path / "test" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000001").write_text("a file")
    (checkpoints / "step_00000002").symlink_to("nowhere")
    common = ("checkpoint.save_interval=6", "checkpoint.keep=1", "train.train_steps=13")
    finish(start(ranks, settings(corpus, tmp_path, *common, "run.stop_at_step=7")))
    for name in ("step_00000001", "step_00000002"):
        (checkpoints / name).unlink()
    planted = plant_foreign_entries(checkpoints)
    planted.remove(checkpoints / "step_00000007")
    assert "step_00000007" in finish(start(ranks, settings(corpus, tmp_path, *common)))
    assert all(os.path.lexists(path) for path in planted)
    own = {path for path in checkpoints.iterdir() if path not in planted}
    assert own == {checkpoints / "step_00000013"}
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == list(range(1, 14))


@pytest.mark.drill
@pytest.mark.parametrize("is_stopped", [True, False], ids=["signal", "last step"])
def test_a_run_killed_in_its_last_save_has_not_ended(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    """exit.json says so, with code 1 and how to resume; a resume repeats only the unsaved steps."""
    with monkeypatch.context() as patch:
        slow_down(patch, tmp_path / "slow", save_s=20.0)
        end = ("checkpoint.save_interval=0", "run.stop_at_step=3")
        process = start(1, settings(corpus, tmp_path, *LONG, *(() if is_stopped else end)))
        if is_stopped:
            wait_for(lambda: steps_done(tmp_path) >= 2, process)
            process.send_signal(signal.SIGTERM)
        wait_for(lambda: is_in("saving", tmp_path), process)
        process.kill()
        process.communicate()
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 1
    assert report["reason"] == f"has not ended yet: saving step {report['step']}"
    assert "train.py" in report["resume"]
    finish(start(1, settings(corpus, tmp_path, *LONG)))
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report == {"code": 0, "reason": "finished", "step": 40, "resume": None}


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_readers_beside_a_run_that_prunes(corpus: Path, tmp_path: Path) -> None:
    """It saves at every step and keeps one; each reader finds and reads a whole checkpoint."""
    often = ("checkpoint.save_interval=1", "checkpoint.keep=1", "evaluate.interval=0")
    writer = start(1, settings(corpus, tmp_path, *often, "train.train_steps=1000000"))
    wait_for(lambda: steps_done(tmp_path) >= 3, writer)
    run_folder = f"run={tmp_path / 'test'}"
    for number in range(3):
        for arguments in (
            ["generate.py", run_folder, "prompt=def", "max_new_tokens=8"],
            ["evaluate.py", run_folder],
            ["export.py", run_folder, f"output={tmp_path / f'exported_{number}'}", "check=false"],
            ["-m", "checkpoints", run_folder, "verify=true"],
        ):
            ended = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
            output = ended.stdout + ended.stderr
            assert ended.returncode == 0, output
            assert "damaged" not in output.lower()
            assert "Traceback" not in output
    assert writer.poll() is None
    writer.send_signal(signal.SIGTERM)
    finish(writer, expected=143)
