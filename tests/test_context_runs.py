"""Whole runs with context parallelism: losses, checkpoints, and a kill."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ONE_RANK, Layout
from tests.runs import (
    finish,
    rows,
    settings,
    start,
    steps_done,
    train_on,
    wait_for,
    workers_of,
)

PACKED = (
    "config=llama_debug.yaml",
    "model.num_query_groups=2",
    "model.qk_layernorm=true",
    "data.packing=best_fit",
    "data.inter_document_masking=true",
)
CP, CP_RING = Layout(cp=2), Layout(cp=2, cp_comm_type="p2p")


def assert_near(curve: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Losses within 2e-6; norms within 2e-5, because gradients are differences."""
    for row, reference in zip(curve, expected, strict=True):
        assert row.keys() == reference.keys()
        for key, value in row.items():
            tolerance = 2e-5 if key == "train/grad_norm" else 2e-6
            assert value == pytest.approx(reference[key], rel=tolerance), (row["step"], key)


def run(corpus: Path, directory: Path, layout: Layout, *overrides: str) -> list[dict[str, Any]]:
    train_on(layout, settings(corpus, directory, *overrides))
    return rows(directory)


@pytest.mark.parametrize("layout", [CP, CP_RING], ids=str)
def test_steps_and_evaluations_equal_one_process(
    corpus: Path, tmp_path: Path, layout: Layout
) -> None:
    """Two steps, an evaluation and a sample."""
    options = (*PACKED, "train.train_steps=2", "evaluate.interval=2")
    curves = [run(corpus, tmp_path / str(one), one, *options) for one in (ONE_RANK, layout)]
    assert [row["step"] for row in curves[0]] == [1, 2, 2]
    assert_near(curves[1], curves[0])
    of_one, of_layout = (
        (tmp_path / str(one) / "test" / "samples.jsonl").read_text() for one in (ONE_RANK, layout)
    )
    assert of_one == of_layout


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(PACKED, id="rope, best_fit, documents"),
        pytest.param(("data.sequence_mode=pack",), id="learned, pack"),
        pytest.param(("data.sequence_mode=pad",), id="learned, pad"),
    ],
)
def test_every_layout_gives_the_same_losses(
    corpus: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Six steps with dropout and rows of 117 tokens, which no layout divides."""
    layouts = {
        CP: 8,
        CP_RING: 2,
        Layout(cp=4): 1,
        Layout(cp=4, cp_comm_type="p2p"): 4,
        Layout(tp=2, cp=2): 2,
        Layout(cp=2, dp=2): 2,
    }
    options = (*options, "model.seq_length=117")
    reference = run(corpus, tmp_path, ONE_RANK, *options, "train.micro_batch_size=4")
    assert [row["step"] for row in reference] == [1, 2, 3, 3, 4, 5, 6, 6]
    for layout, size in layouts.items():
        micro_batch = f"train.micro_batch_size={size}"
        assert_near(run(corpus, tmp_path / str(layout), layout, *options, micro_batch), reference)


@pytest.mark.slow
def test_checkpoints_move_between_axes(corpus: Path, tmp_path: Path) -> None:
    """Two steps each on cp, tp and dp ranks continue one curve, within 1e-5."""
    expected = run(corpus, tmp_path / "whole", CP)
    for step, layout in ((2, CP), (4, Layout(tp=2)), (6, Layout(dp=2))):
        curve = run(corpus, tmp_path / "parts", layout, f"run.stop_at_step={step}")
    assert [row["step"] for row in curve] == [1, 2, 3, 3, 4, 5, 6, 6]
    for row, reference in zip(curve, expected, strict=True):
        assert row == pytest.approx(reference, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three launches
def test_kill_9_loses_nothing(corpus: Path, tmp_path: Path) -> None:
    """A killed and resumed run equals an uninterrupted one, bit for bit."""
    cp = ("parallel.tensor_model_parallel_size=1", "parallel.context_parallel_size=2")
    steps = ("train.train_steps=20", "checkpoint.save_interval=5", "evaluate.interval=0")
    finish(start(2, settings(corpus, tmp_path / "whole", *steps, *cp)))
    arguments = settings(corpus, tmp_path, *steps, *cp)
    process = start(2, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 7, process)
    os.kill(workers_of(tmp_path)[1], signal.SIGKILL)
    process.communicate(timeout=300)
    assert "resuming from" in finish(start(2, arguments))
    assert rows(tmp_path) == rows(tmp_path / "whole")
