"""Whole runs with HSDP: the losses of FSDP, and checkpoints that move between both."""

from pathlib import Path

import pytest

from checkpoints.manifest import read_manifest
from tests.distributed import ONE_RANK, Layout
from tests.runs import rows, settings, train_on
from tests.test_context_runs import assert_near, run

HSDP = Layout(dp=4, replicas=2)
COPIES = Layout(dp=2, replicas=2)  # every rank holds all weights
WITH_TP = Layout(tp=2, dp=2, replicas=2)
WITH_CP = Layout(cp=2, dp=2, replicas=2)
WITH_PP = Layout(pp=2, dp=2, replicas=2)


@pytest.mark.slow
def test_checkpoints_move_between_hsdp_and_other_layouts(corpus: Path, tmp_path: Path) -> None:
    """Six steps on HSDP, two each on HSDP, FSDP and HSDP: one curve, as on one rank."""
    reference = run(corpus, tmp_path / "one", ONE_RANK)
    assert_near(run(corpus, tmp_path / "whole", HSDP), reference)
    for step, layout in ((2, HSDP), (4, Layout(dp=2)), (6, HSDP)):
        curve = run(corpus, tmp_path / "parts", layout, f"run.stop_at_step={step}")
    for row, expected in zip(curve, reference, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    checkpoints = tmp_path / "whole" / "test" / "checkpoints"
    tensors = read_manifest(checkpoints / "step_00000006").tensors.values()
    files = {shard["file"] for tensor in tensors for shard in tensor["shards"]}
    assert files == {f"rank_{rank:05d}.safetensors" for rank in (0, 1)}


def test_an_hsdp_run_resumes_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """Stopped at step 3 and resumed on the same layout."""
    train_on(COPIES, settings(corpus, tmp_path, "run.name=whole"))
    for stop in ("3", "null"):
        arguments = settings(corpus, tmp_path, "run.name=parts", f"run.stop_at_step={stop}")
        train_on(COPIES, arguments)
    assert rows(tmp_path, "parts") == rows(tmp_path, "whole")


@pytest.mark.slow
@pytest.mark.parametrize("gradient_sync", ["step", "micro_batch"])
@pytest.mark.parametrize("layout", [HSDP, COPIES, WITH_TP, WITH_CP, WITH_PP], ids=str)
def test_hsdp_gives_the_same_losses(
    corpus: Path, tmp_path: Path, layout: Layout, gradient_sync: str
) -> None:
    """Six steps of four (or fewer) micro-batches, with dropout."""
    options = ("train.micro_batch_size=1", f"parallel.gradient_sync={gradient_sync}")
    reference = run(corpus, tmp_path / "one", ONE_RANK, *options)
    assert_near(run(corpus, tmp_path / "hsdp", layout, *options), reference)
