"""Whole runs with Muon: the same losses on every layout, checkpoints, and a later stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from configs import ConfigError, parse_config
from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, run_on
from tests.runs import config_on, rows, settings, train_on
from tests.test_context_runs import assert_near
from train import start
from training.optimizer import training_tensors
from training.run_folder import RunFolder

# A usual rate of Muon (0.02) from the first step. Keys and values of two groups: at tp=4, two ranks
# share them.
MUON = (
    "config=llama_debug.yaml",
    "model.num_query_groups=2",
    "optimizer.name=muon",
    "optimizer.muon_lr=0.02",
    "optimizer.lr=3e-3",
    "optimizer.lr_warmup_steps=0",
    "evaluate.interval=0",
)
LAYOUTS = (Layout(tp=2, dp=2), Layout(cp=2), Layout(pp=2))
MORE_LAYOUTS = (
    Layout(tp=2),
    Layout(tp=2, sp=False),
    Layout(tp=4),
    Layout(dp=2),
    Layout(dp=4),
    Layout(tp=2, pp=2),
    Layout(dp=2, pp=2, chunks=2),
    Layout(tp=2, cp=2),
)


def muon_run(
    corpus: Path, directory: Path, layout: Layout, *overrides: str
) -> list[dict[str, Any]]:
    train_on(layout, settings(corpus, directory, *MUON, *overrides))
    return rows(directory)


@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        (LAYOUTS, ()),
        pytest.param(MORE_LAYOUTS, ("model.num_layers=4",), marks=pytest.mark.slow),
    ],
    ids=["quick", "more"],
)
def test_every_layout_gives_the_same_losses(
    corpus: Path, tmp_path: Path, layouts: Sequence[Layout], options: tuple[str, ...]
) -> None:
    """Six steps in float32 with dropout and without warm-up: losses within 2e-6."""
    expected = muon_run(corpus, tmp_path / "one", ONE_RANK, *options)
    assert len(expected) == 6
    assert expected[-1]["train/loss"] < 0.9 * expected[0]["train/loss"]
    for layout in layouts:
        assert_near(muon_run(corpus, tmp_path / str(layout), layout, *options), expected)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(tp=2), Layout(tp=2)),
        pytest.param(Layout(tp=2, dp=2), Layout(tp=2, dp=2), marks=pytest.mark.slow),
        (Layout(tp=2), Layout(dp=2)),
        pytest.param(ONE_RANK, Layout(tp=2, pp=2), marks=pytest.mark.slow),
        pytest.param(Layout(tp=4), ONE_RANK, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resume_continues_the_curve(
    corpus: Path, tmp_path: Path, before: Layout, after: Layout
) -> None:
    """Stopped at step 3: equal bits on the same layout, within 2e-6 on another."""
    whole = muon_run(corpus, tmp_path / "whole", before)
    muon_run(corpus, tmp_path, before, "run.stop_at_step=3")
    parts = muon_run(corpus, tmp_path, after)
    if before == after:
        assert parts == whole
    else:
        assert_near(parts, whole)


def require_equal_state(mesh: Mesh, first: Any, second: Any) -> None:
    """Require that two configurations start with the same weights and optimizer state."""
    tensors = []
    for config in (first, second):
        with RunFolder(config, mesh) as folder:
            run, state = start(config, mesh, folder)
        assert state.num_updates == 3
        tensors.append(training_tensors(run.model, run.optimizer))
    assert tensors[0].keys() == tensors[1].keys()
    for name, shard in tensors[0].items():
        assert shard.tensor.equal(tensors[1][name].tensor), name
        assert shard.tensor.count_nonzero() > 0 or name.endswith("bias")


def test_a_later_stage_may_take_the_state(corpus: Path, tmp_path: Path) -> None:
    """run.init_optimizer loads the momentum, from another layout; another optimizer is refused."""
    muon_run(corpus, tmp_path, Layout(tp=2), "train.train_steps=3")
    arguments = settings(corpus, tmp_path, *MUON)
    stage = [
        a for a in arguments if not a.startswith(("config=", "run.name=", "model.", "data.vocab"))
    ]
    stage += [f"run.init_from={tmp_path / 'test'}", "run.name=stage", "run.init_optimizer=true"]
    configs = {
        "first": config_on(Layout(dp=2), arguments),
        "second": config_on(Layout(dp=2), stage),
    }
    run_on(Layout(dp=2), require_equal_state, **configs)
    message = (
        "run.init_optimizer=true needs optimizer.name=muon, as in .*, instead of adamw; change"
    )
    with pytest.raises(ConfigError, match=message):
        parse_config([a for a in stage if not a.startswith("optimizer.")])
