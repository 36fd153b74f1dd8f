"""Saves while training goes on: what they hold, how they fail, and that there is one at a time."""

import dataclasses
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import checkpoints.save as save_module
import saving as saving_module
from checkpoints import find_checkpoint
from configs import Config, parse_config
from parallel import Mesh, any_rank
from run_folder import RunFolder
from run_state import RunState
from saving import Saving
from stopping import SaveError
from tests.distributed import ONE_RANK, Layout, distributed
from tests.runs import finish, rows, settings, start
from train import start as start_run


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """A short run."""
    return parse_config(settings(corpus, tmp_path))


def on_layout(config: Config, mesh: Mesh) -> Config:
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=mesh.tp.size)
    return dataclasses.replace(config, parallel=parallel)


def at(state: RunState, step: int) -> RunState:
    return dataclasses.replace(state, step=step)


def steps_saved(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.glob("step_*"))


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
def test_one_save_at_a_time(mesh: Mesh, config: Config) -> None:
    """Nothing is committed before the slowest rank has written; a second save waits for the first.

    Afterwards a state that is saved already is not saved again.
    """
    config, writing = on_layout(config, mesh), threading.Event()
    original = save_module.save_file

    def slow(tensors: Any, path: Path) -> None:
        if mesh.world.rank == mesh.world.size - 1:
            assert writing.wait(timeout=20)
        original(tensors, path)

    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        saving = Saving(run, state)
        patch.setattr(save_module, "save_file", slow)
        saving.begin(at(state, 1), background=True)
        for _ in range(3):
            saving.settle()
            any_rank(mesh, False)
            assert steps_saved(folder) == []
        writing.set()
        saving.begin(at(state, 2), background=True)
        assert saving.saved_step == 1
        saving.end(at(state, 2))
        assert steps_saved(folder) == ["step_00000001", "step_00000002"]
        manifest = folder.checkpoints / "step_00000002" / "manifest.json"
        written_at = manifest.stat().st_mtime_ns
        saving.end(at(state, 2))
        assert manifest.stat().st_mtime_ns == written_at


@distributed(ONE_RANK, Layout(tp=2))
def test_a_failed_save_is_reported_and_the_next_one_works(mesh: Mesh, config: Config) -> None:
    """A disk that is full for a while costs that checkpoint and nothing else."""
    config = on_layout(config, mesh)
    original = save_module.save_file

    def failing(tensors: Any, path: Path) -> None:
        if mesh.world.rank == mesh.world.size - 1:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("microtron").addHandler(handler)
    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        saving = Saving(run, state)
        saving.begin(at(state, 1), background=True)
        saving.settle(wait=True)
        patch.setattr(save_module, "save_file", failing)
        saving.begin(at(state, 2), background=True)
        saving.settle(wait=True)
        assert steps_saved(folder) == ["step_00000001"]
        assert not list(folder.checkpoints.glob(".tmp-*"))
        if mesh.world.rank == 0:
            (message,) = [text for text in said if "cannot save step 2" in text]
            assert f"rank {mesh.world.size - 1} cannot write" in message
        with pytest.raises(SaveError, match=r"step 3 is not saved.*goes on from step 1"):
            saving.end(at(state, 3))
        patch.undo()
        saving.begin(at(state, 4), background=True)
        saving.end(at(state, 4))
        checkpoint = find_checkpoint(folder.checkpoints, mesh)
        assert checkpoint is not None
        assert checkpoint.step == 4
    logging.getLogger("microtron").removeHandler(handler)


@distributed(Layout(tp=2))
def test_without_memory_for_a_copy_training_waits(mesh: Mesh, config: Config) -> None:
    """One rank without is enough, as all must do the same."""
    config = on_layout(config, mesh)
    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        patch.setattr(saving_module, "copies_fit", lambda _: mesh.tp.rank == 0)
        saving = Saving(run, state)
        saving.begin(at(state, 1), background=True)
        assert saving.pending is None
        assert steps_saved(folder) == ["step_00000001"]
        assert saving.saved_step == 1


@distributed(ONE_RANK, Layout(tp=2))
def test_no_writer_outlives_the_lock(mesh: Mesh, config: Config) -> None:
    """After an error a save under way is no checkpoint, and nobody writes into the folder."""
    config = on_layout(config, mesh)
    original = save_module.save_file

    def slow(tensors: Any, path: Path) -> None:
        time.sleep(0.5)
        original(tensors, path)

    with RunFolder(config, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        run, state = start_run(config, mesh, folder)
        patch.setattr(save_module, "save_file", slow)
        with pytest.raises(KeyError), Saving(run, state) as saving:  # noqa: PT012
            saving.begin(at(state, 1), background=True)
            pending = saving.pending
            raise KeyError
        assert pending is not None
        assert pending.is_written
        assert steps_saved(folder) == []


def test_a_full_disk_costs_only_the_save(corpus: Path, tmp_path: Path) -> None:
    """The run trains on, says at its end what is not saved, and goes on from the save before."""
    whole, parts = "run.name=whole", "run.name=parts"
    often = "checkpoint.save_interval=1"
    finish(start(1, settings(corpus, tmp_path, whole, often)))
    finish(start(1, settings(corpus, tmp_path, parts, often, "run.stop_at_step=3")))
    arguments = settings(corpus, tmp_path, parts, often)
    output = finish(start(1, arguments, largest_file_kib=100), expected=1)
    assert "Traceback" not in output
    assert output.count("cannot save step 4: rank 0 cannot write") == 1
    report = json.loads((tmp_path / "parts" / "exit.json").read_text())
    assert report["code"] == 1
    assert report["reason"].startswith("step 6 is not saved: cannot save step 6: rank 0 cannot wr")
    assert report["reason"].endswith("mend that and resume, which goes on from step 3")
    assert "resuming from" in finish(start(1, arguments))
    assert rows(tmp_path, "parts") == rows(tmp_path, "whole")
