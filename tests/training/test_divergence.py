"""A loss or gradient that is not finite skips its update and changes nothing else.

Samples are poisoned by number: the last tp rank of the dp rank that has one gets a NaN gradient.
"""

import dataclasses
import json
import signal
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train as train_module
from configs import Config, parse_config
from data.rows import MicroBatch
from parallel import LocalShard, Mesh, any_rank
from tests.distributed import ONE_RANK, Layout, distributed
from tests.runs import rows, settings
from train import train
from training import step as step_module
from training.divergence import NonFiniteError
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.state import Run, RunState

LAYOUTS = (ONE_RANK, Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2))
BATCH = 8  # samples of a step


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """Six steps with a save every two; at most one consecutive step may be skipped."""
    overrides = (
        "evaluate.interval=0",
        "checkpoint.save_interval=2",
        "train.max_consecutive_skips=1",
        "train.micro_batch_size=2",
    )
    return parse_config(settings(corpus, tmp_path, *overrides))


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """A configuration with other values in some sections."""
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **values)
            for name, values in sections.items()
        },
    )


def run(mesh: Mesh, config: Config, **run_keys: Any) -> list[dict[str, Any]]:
    """Train on this layout; return the rows of metrics.jsonl."""
    config = changed(config, parallel={"tensor_model_parallel_size": mesh.tp.size}, run=run_keys)
    with RunFolder(config, mesh) as folder:
        assert train(config, mesh, folder, StopSignals()) == 0
    return rows(Path(config.run.directory), str(config.run.name))


def steps_saved(checkpoints: Path) -> list[int]:
    """The steps of all checkpoints in a folder."""
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))


@contextmanager
def poisoned(mesh: Mesh, samples: Container[int]) -> Iterator[list[tuple[int, list[int]]]]:
    """Make gradients of these samples NaN; yield each step and this rank's samples."""
    seen: list[tuple[int, list[int]]] = []
    sum_gradients = step_module.sum_partial_gradients
    forward_backward = step_module.forward_backward

    def note_samples(
        run: Run, state: RunState, micro_batches: Sequence[MicroBatch], *others: Any
    ) -> Tensor:
        of_step = [sample for one in micro_batches for sample in one.sample_indices.tolist()]
        seen.append((state.step, of_step))
        return forward_backward(run, state, micro_batches, *others)

    def poison(gradients: Sequence[LocalShard], mesh: Mesh) -> None:
        if mesh.tp.rank == mesh.tp.size - 1 and any(n in samples for n in seen[-1][1]):
            gradients[0].tensor.view(-1)[:1] = float("nan")
        sum_gradients(gradients, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "forward_backward", note_samples)
        patch.setattr(step_module, "sum_partial_gradients", poison)
        yield seen


@contextmanager
def forced_skip(step: int) -> Iterator[None]:
    """Skip the update of this step although its numbers are good."""
    judge = step_module.skip_reason

    def reason(loss: float, norm: float, state: RunState, *others: Any) -> str | None:
        return "forced" if state.step + 1 == step else judge(loss, norm, state, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_module, "skip_reason", reason)
        yield


@distributed(*LAYOUTS)
def test_all_ranks_skip_one_bad_update(mesh: Mesh, config: Config) -> None:
    """NaN on one rank at step 3 gives the curve of a run that skips this step on purpose."""
    require_one_skip(mesh, config)


@pytest.mark.slow
@distributed(Layout(tp=2, dp=2))
def test_a_skipped_update_leaves_the_momentum_of_muon(mesh: Mesh, config: Config) -> None:
    require_one_skip(mesh, changed(config, optimizer={"name": "muon"}))


def require_one_skip(mesh: Mesh, config: Config) -> None:
    with poisoned(mesh, range(17, 18)):
        curve = run(mesh, config, name="bad")
    with forced_skip(3):
        expected = run(mesh, config, name="forced")
    assert curve[2].pop("train/grad_norm") is None
    expected[2].pop("train/grad_norm")
    assert curve == expected
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [row.get("train/skipped_steps", 0) for row in curve] == [0, 0, 1, 1, 1, 1]


@pytest.mark.slow
@distributed(ONE_RANK, Layout(tp=2, dp=2))
@pytest.mark.parametrize("stop_at_step", [3, 4])
def test_a_resume_remembers_skipped_steps(mesh: Mesh, config: Config, stop_at_step: int) -> None:
    """AdamW counts updates, not steps; a stop after a bad step does not change the curve."""
    with poisoned(mesh, range(17, 18)) as seen:
        whole = run(mesh, config, name="whole")
        run(mesh, config, name="parts", stop_at_step=stop_at_step)
        seen.clear()
        parts = run(mesh, config, name="parts")
    assert parts == whole
    assert [step for step, _ in seen] == list(range(stop_at_step, 6))


@pytest.mark.slow
@distributed(ONE_RANK, Layout(tp=2))
def test_a_rollback_ignores_a_checkpoint_between_skipped_steps(mesh: Mesh, config: Config) -> None:
    """Steps 3 and 4 are bad and the run stops between them: it rolls back to 2, not to 3.

    The checkpoint of step 3 does not count towards checkpoint.keep, and the rollback deletes it.
    """
    config = changed(config, checkpoint={"keep": 1})
    checkpoints = Path(config.run.directory, "parts", "checkpoints")
    with poisoned(mesh, range(16, 40)) as seen:
        whole = run(mesh, config, name="whole")
        run(mesh, config, name="parts", stop_at_step=3)
        assert steps_saved(checkpoints) == [2, 3]
        seen.clear()
        run(mesh, config, name="parts", stop_at_step=5)
        assert [step for step, _ in seen] == [3, 2, 3, 4]
        # Step 4 was saved too, and then pruned by rank 0, which the other ranks do not wait for.
        any_rank(mesh, False)
        assert steps_saved(checkpoints) == [5]
        parts = run(mesh, config, name="parts")
    assert parts == whole


@distributed(ONE_RANK)
def test_a_checkpoint_of_a_skipped_step_is_no_rollback_target(mesh: Mesh, config: Config) -> None:
    """The only checkpoint was saved after a skipped step, so its weights may be the cause."""
    with poisoned(mesh, range(8, 10**6)):
        run(mesh, changed(config, checkpoint={"save_interval": 0}), stop_at_step=2)
        with pytest.raises(NonFiniteError, match="there is no checkpoint to roll back to"):
            run(mesh, config)


@distributed(*LAYOUTS)
def test_too_many_consecutive_skips_roll_back(mesh: Mesh, config: Config) -> None:
    """Steps 3 and 4 are bad: the run rolls back to step 2, and its next step 3 is bad again.

    Each step is in metrics.jsonl once.
    """
    with poisoned(mesh, range(16, 40)) as seen:
        curve = run(mesh, config)
    share = BATCH // mesh.dp.size
    first = [(step, samples[0] - mesh.dp.rank * share) for step, samples in seen]
    assert first == [(0, 0), (1, 8), (2, 16), (3, 24), (2, 32), (3, 40), (4, 48), (5, 56)]
    assert [row["step"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert [row["train/grad_norm"] is None for row in curve] == [False, False, True, *[False] * 3]
    manifest = Path(config.run.directory, "test", "checkpoints", "step_00000006", "manifest.json")
    progress = json.loads(manifest.read_text())["state"]["progress"]
    assert progress["skipped_windows"] == [[2, 16, 32]]
    assert (progress["consumed_samples"], progress["skipped_steps"]) == (64, 1)


@distributed(ONE_RANK)
def test_a_stop_after_a_rollback_reports_the_step_it_is_at(mesh: Mesh, config: Config) -> None:
    """Step 2, which is saved, not step 4, which is not."""
    answers = iter([None, signal.SIGTERM])
    with poisoned(mesh, range(16, 40)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "agree_now", lambda *_: next(answers))
        with RunFolder(config, mesh) as folder:
            assert train(config, mesh, folder, StopSignals()) == 143
    report = json.loads(Path(config.run.directory, "test", "exit.json").read_text())
    assert report["step"] == 2


@distributed(ONE_RANK)
def test_a_rollback_at_the_last_step_does_not_announce_the_end(mesh: Mesh, config: Config) -> None:
    """Steps 5 and 6 are bad; training goes on at step 5, and exit.json must not tell otherwise."""
    events: list[str] = []
    announce, go_back = RunFolder.announce_last_save, train_module.roll_back

    def note_save(folder: RunFolder) -> None:
        events.append("last save")
        announce(folder)

    def note_rollback(*arguments: Any) -> RunState:
        events.append("rollback")
        return go_back(*arguments)

    with poisoned(mesh, range(32, 48)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "announce_last_save", note_save)
        patch.setattr(train_module, "roll_back", note_rollback)
        run(mesh, config)
    assert events[0] == "rollback"
    assert set(events[1:]) == {"last save"}


@pytest.mark.slow
@distributed(ONE_RANK, Layout(dp=2))
def test_rollbacks_are_limited(mesh: Mesh, config: Config) -> None:
    """All samples from step 3 on are bad: two rollbacks to step 2, then exit code 5."""
    with (
        poisoned(mesh, range(16, 10**6)) as seen,
        pytest.raises(NonFiniteError, match="skipped after 2 rollbacks to step 2") as caught,
    ):
        run(mesh, config)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 2, 3, 2, 3]
    if mesh.world.rank == 0:
        report = json.loads(Path(config.run.directory, "test", "exit.json").read_text())
        assert (report["code"], report["reason"]) == (5, str(caught.value))


@distributed(ONE_RANK)
def test_without_a_checkpoint_the_run_ends(mesh: Mesh, config: Config) -> None:
    """Starting over would meet the same samples."""
    with (
        poisoned(mesh, range(10**6)),
        pytest.raises(NonFiniteError, match=r"no checkpoint to roll back to; .* start again with"),
    ):
        run(mesh, config)


@pytest.mark.slow
@distributed(ONE_RANK, Layout(tp=2, dp=2))
def test_a_loss_spike_is_skipped(mesh: Mesh, config: Config) -> None:
    """All targets of step 9 are a byte that no text has, so it is skipped. Off by default."""
    config = changed(config, train={"train_steps": 10})
    give = MicroBatch.inputs

    def nonsense(micro_batch: MicroBatch) -> dict[str, Any]:
        inputs = give(micro_batch)
        if 64 <= int(micro_batch.sample_indices[0]) < 72:
            assert inputs["targets"] is not None
            inputs["targets"] = torch.full_like(inputs["targets"], 7)
        return inputs

    curves = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MicroBatch, "inputs", nonsense)
        patch.setattr(RunState, "NUM_RECENT", 4)
        for name, nats in (("off", None), ("on", 1.0)):
            curves[name] = run(
                mesh, changed(config, train={"loss_spike_threshold_nats": nats}), name=name
            )
    assert [row.get("train/skipped_steps", 0) for row in curves["off"]] == [0] * 10
    assert [row.get("train/skipped_steps", 0) for row in curves["on"]] == [*[0] * 8, 1, 1]
    assert curves["on"][8]["train/loss"] == curves["off"][8]["train/loss"]
    assert curves["on"][8]["train/loss"] > curves["on"][7]["train/loss"] + 1
    assert curves["on"][9]["train/loss"] != curves["off"][9]["train/loss"]


@distributed(ONE_RANK, Layout(tp=2))
def test_weights_that_are_not_finite_are_never_saved(mesh: Mesh, config: Config) -> None:
    """No run could resume from such a checkpoint."""
    config = changed(
        config,
        checkpoint={"save_interval": 1},
        optimizer={"lr": 1e39, "clip_grad": 0.0, "lr_warmup_steps": 0},
        train={"train_steps": 2},
    )
    with pytest.raises(NonFiniteError, match="step 2: its weights or moments are not finite"):
        run(mesh, config)
    assert not list(Path(config.run.directory, "test", "checkpoints").glob("step_*"))
