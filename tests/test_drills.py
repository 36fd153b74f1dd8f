"""What a run survives again and again; short here, at length as `make drills` (mark `drill`)."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import ONE_RANK, Layout
from tests.lines import ROOT
from tests.runs import rows, settings, train_on

# Every TP x DP out of {1, 2, 4} on four ranks at most.
GRIDS = [Layout(tp=tp, dp=dp) for tp in (1, 2, 4) for dp in (1, 2, 4) if tp * dp <= 4]


def at_length(number: int) -> object:
    """A number that takes minutes."""
    return pytest.param(number, marks=[pytest.mark.drill, pytest.mark.timeout(3600)])


@pytest.mark.parametrize("num_kills", [6, at_length(200)])
def test_every_kill_is_survived_to_the_bit(num_kills: int) -> None:
    """See kill_fuzz.py. At least a quarter of the kills meet a save."""
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
def test_a_run_goes_from_layout_to_layout(corpus: Path, tmp_path: Path, num_changes: int) -> None:
    """Each time a step on another grid, drawn: the curve within 1e-5 of one process's, dropout on.

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
