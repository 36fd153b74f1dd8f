"""`train.time_limit_s`: steps are measured once, and the run is that of so many steps."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from checkpoints.manifest import read_manifest
from configs import Config, TrainConfig
from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, run_on
from tests.runs import config_on, rows, run_in_pool, settings, train_on
from tests.training.test_resume import resume
from training import step as module
from training.resume import limit_steps
from training.state import StepResult

LIMIT = ("train.time_limit_s=750000", "train.train_steps=1000", "evaluate.interval=7")
SECONDS = 1e5  # of a step: 7 fit, however long the measurement takes


def run_with_clock(mesh: Mesh, config: Config, seconds: float) -> None:
    """Train on one rank of the pool, which measures `seconds` on rank 0, and more on others."""
    train_step = module.train_step

    def measured(*arguments: Any) -> StepResult:
        return replace(train_step(*arguments), elapsed_s=seconds * (1 + mesh.world.rank))

    with patch.object(module, "train_step", measured):
        run_in_pool(mesh, config, "widened")


def train_with_clock(layout: Layout, arguments: list[str], seconds: float = SECONDS) -> None:
    """Run a configuration on a layout, with steps that seem to take `seconds`."""
    run_on(layout, run_with_clock, config=config_on(layout, arguments), seconds=seconds)


@pytest.mark.slow
def test_a_limited_run_equals_one_of_that_many_steps(corpus: Path, tmp_path: Path) -> None:
    """Measuring leaves no trace in losses, evaluations and samples; rank 0 decides for all."""
    layout, common = Layout(tp=2), (corpus, tmp_path, *LIMIT)
    train_with_clock(layout, settings(*common))
    plain = ("run.name=plain", "train.time_limit_s=null", "train.train_steps=7")
    train_on(layout, settings(*common, *plain))
    assert rows(tmp_path) == rows(tmp_path, "plain")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("test", "plain")]
    assert samples[0] == samples[1]
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert (report["step"], report["resume"]) == (7, None)
    saved = read_manifest(tmp_path / "test" / "checkpoints" / "step_00000007").state["config"]
    assert (saved["train.train_steps"], saved["train.time_limit_s"]) == (7, 750000)


def test_a_resume_keeps_the_number_of_steps(corpus: Path, tmp_path: Path) -> None:
    """Also if steps take longer now, and on another layout."""
    arguments = settings(corpus, tmp_path, *LIMIT)
    train_with_clock(ONE_RANK, [*arguments, "run.name=unbroken"])
    unbroken = rows(tmp_path, "unbroken")
    with pytest.raises(pytest.fail.Exception, match="NaN"):
        train_with_clock(ONE_RANK, arguments, math.nan)  # ends before the number is known
    train_with_clock(ONE_RANK, [*arguments, "run.stop_at_step=3"])
    shutil.copytree(tmp_path / "test", tmp_path / "copy")
    train_with_clock(ONE_RANK, arguments, 4 * SECONDS)
    assert rows(tmp_path) == unbroken
    train_with_clock(Layout(dp=2), [*arguments, "run.name=copy"], 4 * SECONDS)
    for key in ("step", "train/learning_rate"):
        assert [row.get(key) for row in rows(tmp_path, "copy")] == [
            row.get(key) for row in unbroken
        ]


def test_a_smaller_number_of_steps_counts() -> None:
    """`train.train_steps` stays the maximum."""
    config = Config(train=TrainConfig(train_steps=5, time_limit_s=60.0))
    assert [limit_steps(config, n).train.train_steps for n in (None, 3, 7)] == [5, 3, 5]
    assert limit_steps(Config(), 7) == Config()


def test_a_run_keeps_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is refused, as it would need other steps; without one, train_steps counts."""
    none, limited, other = (Config(train=TrainConfig(time_limit_s=s)) for s in (None, 60.0, 90.0))
    resume(monkeypatch, limited, limited)
    resume(monkeypatch, limited, none)
    for before, now in ((none, limited), (limited, other)):
        with pytest.raises(Exception, match=r"cannot resume .* train\.time_limit_s=[69]0\.0 \(was"):
            resume(monkeypatch, before, now)
