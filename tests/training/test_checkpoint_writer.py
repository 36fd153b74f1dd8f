"""Background saves: their order, contents and failures."""

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import checkpoints.save as save_module
from checkpoints import find_checkpoint
from configs import Config, parse_config
from parallel import Mesh, any_rank
from tests.distributed import ONE_RANK, Layout, distributed
from tests.runs import finish, rows, settings, start
from train import start as start_run
from train import train
from training import checkpoint_writer as saving_module
from training.checkpoint_writer import CheckpointWriter, SaveError
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.state import RunState


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """A short run."""
    return parse_config(settings(corpus, tmp_path))


def on_layout(config: Config, mesh: Mesh) -> Config:
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=mesh.tp.size)
    return dataclasses.replace(config, parallel=parallel)


def at(state: RunState, step: int) -> RunState:
    return dataclasses.replace(state, step=step)


def after_a_skip(state: RunState, step: int) -> RunState:
    """A state whose last step was skipped."""
    return dataclasses.replace(state, step=step, skipped_in_a_row=1, skipped_steps=1)


def steps_saved(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.glob("step_*"))


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize(("interval", "fails_at"), [(3, 3), (0, 6)])
def test_an_evaluation_that_fails_loses_no_step(
    mesh: Mesh, corpus: Path, tmp_path: Path, interval: int, fails_at: int
) -> None:
    """Before it begins the save in the background is committed, and the last step is saved."""

    def fail(*_: Any) -> None:
        raise MemoryError

    overrides = (f"checkpoint.save_interval={interval}", f"evaluate.interval={fails_at}")
    config = on_layout(parse_config(settings(corpus, tmp_path, *overrides)), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.evaluate", fail)
        with pytest.raises(MemoryError), RunFolder(config, mesh) as folder:
            train(config, mesh, folder, StopSignals())
    assert steps_saved(folder) == [f"step_{fails_at:08d}"]


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
def test_one_save_at_a_time(mesh: Mesh, config: Config) -> None:
    """A save is committed when the slowest rank has written it; a second save waits for the first.

    The last save is left out if the state is already saved.
    """
    config, writing = on_layout(config, mesh), threading.Event()
    original = save_module.save_file

    def slow(tensors: Any, path: Path) -> None:
        if mesh.world.rank == mesh.world.size - 1:
            assert writing.wait(timeout=20)
        original(tensors, path)

    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        saving = CheckpointWriter(run, state)
        patch.setattr(save_module, "save_file", slow)
        saving.begin(at(state, 1), background=True)
        for _ in range(3):
            saving.commit_if_written()
            any_rank(mesh, False)
            assert steps_saved(folder) == []
        writing.set()
        saving.begin(at(state, 2), background=True)
        assert folder.saved_step == 1
        saving.end(at(state, 2))
        assert steps_saved(folder) == ["step_00000001", "step_00000002"]
        manifest = folder.checkpoints / "step_00000002" / "manifest.json"
        written_at = manifest.stat().st_mtime_ns
        saving.end(at(state, 2))
        assert manifest.stat().st_mtime_ns == written_at


@distributed(ONE_RANK, Layout(tp=2))
def test_a_failed_save_is_reported_and_the_next_one_works(mesh: Mesh, config: Config) -> None:
    """A temporarily full disk loses one checkpoint."""
    config = on_layout(config, mesh)
    original = save_module.save_file

    def failing(tensors: Any, path: Path) -> None:
        if mesh.world.rank == mesh.world.size - 1:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("microtron").addHandler(handler)
    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        saving = CheckpointWriter(run, state)
        saving.begin(at(state, 1), background=True)
        saving.commit_if_written(wait=True)
        patch.setattr(save_module, "save_file", failing)
        saving.begin(at(state, 2), background=True)
        saving.commit_if_written(wait=True)
        assert steps_saved(folder) == ["step_00000001"]
        assert not list(folder.checkpoints.glob(".tmp-*"))
        if mesh.world.rank == 0:
            (message,) = [text for text in logged if "cannot save step 2" in text]
            assert f"rank {mesh.world.size - 1} cannot write" in message
        with pytest.raises(SaveError, match=r"step 3 is not saved.*resume from step 1"):
            saving.end(at(state, 3))
        patch.undo()
        saving = CheckpointWriter(run, at(state, 1))
        saving.begin(at(state, 4), background=True)
        saving.end(at(state, 4))
        checkpoint = find_checkpoint(folder.checkpoints, mesh)
        assert checkpoint is not None
        assert checkpoint.step == 4
    logging.getLogger("microtron").removeHandler(handler)


@distributed(ONE_RANK, Layout(tp=2))
def test_a_stop_after_a_skipped_step_saves_it(mesh: Mesh, config: Config) -> None:
    """While training continues, no state after a skipped step is saved.

    With checkpoint.keep=1 the newest checkpoint from before the skips is kept too, for a rollback.
    """
    checkpoint = dataclasses.replace(config.checkpoint, keep=1)
    config = dataclasses.replace(on_layout(config, mesh), checkpoint=checkpoint)
    with RunFolder(config, mesh) as folder:
        run, state = start_run(config, mesh, folder)
        saving = CheckpointWriter(run, state)
        for step in (1, 2):
            saving.begin(at(state, step), background=True)
        saving.begin(after_a_skip(state, 3), background=True)
        saving.commit_if_written(wait=True)
        any_rank(mesh, False)
        assert steps_saved(folder) == ["step_00000002"]
        saving.end(after_a_skip(state, 4))
        saving.prune()
        any_rank(mesh, False)
        assert steps_saved(folder) == ["step_00000002", "step_00000004"]
        checkpoint_there = find_checkpoint(folder.checkpoints, mesh)
        assert checkpoint_there is not None
        assert checkpoint_there.state["progress"]["skipped_in_a_row"] == 1
        saving.begin(at(state, 5), background=False)
        any_rank(mesh, False)
        assert steps_saved(folder) == ["step_00000005"]


@distributed(ONE_RANK, Layout(tp=2))
def test_a_run_whose_saves_all_fail_ends(mesh: Mesh, config: Config) -> None:
    """All ranks raise after checkpoint.max_failed_saves consecutive failures.

    The last save is always tried.
    """
    config = on_layout(config, mesh)
    original, failing, may_fail = save_module.save_file, {1, 3, 4}, threading.Event()

    def limited(tensors: Any, path: Path) -> None:
        step = int(path.parent.name.rpartition("_")[2])
        if step in failing and mesh.world.rank == mesh.world.size - 1:
            assert may_fail.wait(timeout=20)
            raise OSError(28, "No space left on device")
        original(tensors, path)

    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        patch.setattr(save_module, "save_file", limited)
        may_fail.set()
        saving = CheckpointWriter(run, state)
        saving.begin(at(state, 1), background=True)
        saving.end(at(state, 2))
        saving.begin(at(state, 3), background=True)
        saving.commit_if_written(wait=True)
        may_fail.clear()
        saving.begin(at(state, 4), background=True)
        may_fail.set()
        saving.end(at(state, 5))
        assert steps_saved(folder) == ["step_00000002", "step_00000005"]
        for background in (True, False):
            saving = CheckpointWriter(run, at(state, 2))
            saving.begin(at(state, 3), background=False)
            with pytest.raises(SaveError) as caught:  # noqa: PT012
                saving.begin(at(state, 4), background=background)
                saving.commit_if_written(wait=True)
            text = str(caught.value)
            assert "step 4 is not saved after 2 consecutive failed saves" in text
            assert "(checkpoint.max_failed_saves=2): cannot save step 4: " in text
            assert text.endswith("fix the cause, then resume from step 2")


@distributed(Layout(tp=2))
def test_without_memory_for_a_copy_training_waits(mesh: Mesh, config: Config) -> None:
    """If one rank has no memory for a copy, all ranks save synchronously and say so."""
    config = on_layout(config, mesh)
    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        log = Mock()
        patch.setattr(saving_module.logger, "info", log)
        patch.setattr(saving_module, "host_memory_allows", lambda _: mesh.tp.rank == 0)
        saving = CheckpointWriter(run, state)
        saving.begin(at(state, 1), background=True)
        assert saving.pending is None
        assert steps_saved(folder) == ["step_00000001"]
        assert folder.saved_step == 1
        assert "training waits for this save" in log.call_args_list[0].args[0]


@distributed(ONE_RANK, Layout(tp=2))
def test_no_writer_outlives_the_lock(mesh: Mesh, config: Config) -> None:
    """After an error no pending save is committed, and no thread still writes."""
    config = on_layout(config, mesh)
    original = save_module.save_file

    def slow(tensors: Any, path: Path) -> None:
        time.sleep(0.5)
        original(tensors, path)

    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        patch.setattr(save_module, "save_file", slow)
        with pytest.raises(KeyError), CheckpointWriter(run, state) as saving:  # noqa: PT012
            saving.begin(at(state, 1), background=True)
            pending = saving.pending
            raise KeyError
        assert pending is not None
        assert pending.is_written
        assert steps_saved(folder) == []


def test_a_full_disk_costs_only_the_save(corpus: Path, tmp_path: Path) -> None:
    """The run continues, reports the failed save, and resumes from the one before."""
    whole, parts = "run.name=whole", "run.name=parts"
    often = "checkpoint.save_interval=1"
    finish(start(1, settings(corpus, tmp_path, whole, often)))
    finish(start(1, settings(corpus, tmp_path, parts, often, "run.stop_at_step=3")))
    arguments = settings(corpus, tmp_path, parts, often)
    for key, last in ("checkpoint.async_save=false", 5), ("checkpoint.max_failed_saves=10", 6):
        output = finish(start(1, [*arguments, key], largest_file_kib=100), expected=1)
        assert "Traceback" not in output
        assert output.count("cannot save step 4: rank 0 cannot write") == 1
        report = json.loads((tmp_path / "parts" / "exit.json").read_text())
        assert (report["code"], report["step"]) == (1, last)
        assert report["reason"].startswith(f"step {last} is not saved")
        assert f"cannot save step {last}: rank 0 cannot write" in report["reason"]
        assert report["reason"].endswith("resume from step 3")
        assert "train.py" in report["resume"]
    assert "resuming from" in finish(start(1, arguments))
    assert rows(tmp_path, "parts") == rows(tmp_path, "whole")
