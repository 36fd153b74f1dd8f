"""The run folder: links, locks, unshared or unwritable folders, and exit.json."""

import contextlib
import dataclasses
import errno
import json
import signal
import time
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest

from configs import Config, RunConfig, UserError, parse_config
from parallel import Mesh, any_rank
from tests.distributed import ONE_RANK, Layout, distributed
from tests.runs import settings
from tests.training.test_divergence import changed, poisoned
from tracking import metrics as metrics_module
from train import train
from training import checkpoint_writer as saving_module
from training import lock as lock_module
from training import run_folder as module
from training.divergence import NonFiniteError
from training.run_folder import RunFolder, exit_on_error
from training.signals import StopSignals

OLD = json.dumps({"code": 0, "reason": "finished", "step": 7, "resume": None})


def config(directory: Path, resume: Literal["auto", "never"] = "auto") -> Config:
    run = RunConfig(name="test", directory=str(directory), resume=resume)
    return dataclasses.replace(Config(), run=run)


def report(directory: Path) -> dict[str, Any]:
    """The content of exit.json."""
    return dict(json.loads((directory / "test" / "exit.json").read_text()))


def plant_finished_run(directory: Path) -> None:
    """Write what a finished run leaves."""
    (directory / "test" / "checkpoints" / "step_00000007").mkdir(parents=True)
    (directory / "test" / "exit.json").write_text(OLD)


@distributed(Layout(dp=2))
def test_ranks_with_other_settings_are_refused(mesh: Mesh, tmp_path: Path) -> None:
    """As where one host has an old config file. Paths may differ; the rank is named."""
    started = config(tmp_path)
    train = dataclasses.replace(started.train, num_threads=1 + mesh.world.rank)
    with RunFolder(dataclasses.replace(started, train=train), mesh):
        pass
    optimizer = dataclasses.replace(started.optimizer, lr=1e-4 if mesh.world.rank else 1e-3)
    expected = r"^optimizer.lr=0.0001 on rank 1 \(host .*\), but 0.001 on rank 0; start all hosts"
    other = RunFolder(dataclasses.replace(started, optimizer=optimizer), mesh)
    with pytest.raises(UserError, match=expected):
        other.__enter__()


@distributed(ONE_RANK, Layout(dp=2))
@pytest.mark.parametrize(
    "name", ["", "checkpoints", "metrics.jsonl", "samples.jsonl", "tensorboard", ".lock"]
)
def test_a_link_is_refused_and_its_target_left_alone(mesh: Mesh, tmp_path: Path, name: str) -> None:
    """All ranks name link and target; nothing is written or deleted there."""
    victim, path = tmp_path / "victim", tmp_path / "test" / name
    if mesh.world.rank == 0:
        if name in ("", "checkpoints"):
            victim.mkdir()
            (victim / ".tmp-step_00000001").mkdir()
        else:
            victim.write_text("precious")
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(victim)
    with (
        pytest.raises(UserError, match=r"is a symbolic link to .*victim"),
        RunFolder(config(tmp_path), mesh),
    ):
        pass
    if victim.is_dir():
        assert [entry.name for entry in victim.iterdir()] == [".tmp-step_00000001"]
    else:
        assert victim.read_text() == "precious"


@distributed(ONE_RANK, Layout(dp=2))
def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(
    mesh: Mesh, tmp_path: Path
) -> None:
    """The error comes before training; here the folder is a file."""
    if mesh.world.rank == 0:
        (tmp_path / "test").write_text("")
    with pytest.raises(UserError, match=r"cannot write in run folder .*test: (Not|File)"):
        RunFolder(config(tmp_path), mesh).__enter__()


@distributed(ONE_RANK)
def test_links_outside_the_run_folder_are_allowed(mesh: Mesh, tmp_path: Path) -> None:
    """run.directory itself may be a link, to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with RunFolder(config(tmp_path / "runs"), mesh) as folder:
        folder.write_exit(0, "finished")
    report = json.loads((tmp_path / "disk" / "test" / "exit.json").read_text())
    assert report["code"] == 0


@distributed(Layout(tp=2), Layout(dp=2))
def test_ranks_that_do_not_share_the_folder_are_refused(mesh: Mesh, tmp_path: Path) -> None:
    """Even if each rank has its own folder with an earlier run; all ranks name rank 0's."""
    own = tmp_path / str(mesh.world.rank)
    plant_finished_run(own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WAIT_FOR_FILES_S", 0.2)
        with pytest.raises(UserError) as caught, RunFolder(config(own), mesh):
            pass
    text = str(caught.value)
    assert text.startswith(f"run.directory={tmp_path / '0'} is not shared by all ranks: ranks [1] ")
    assert f"do not see the folder {tmp_path / '0' / 'test'} that rank 0 created" in text
    assert text.endswith("set run.directory to a folder that all hosts share")
    any_rank(mesh, False)
    left = {path.name for path in (own / "test").iterdir()}
    assert left - {".lock"} == {"checkpoints", "exit.json"}


@distributed(Layout(dp=2))
def test_a_rank_that_cannot_write_is_named(mesh: Mesh, tmp_path: Path) -> None:
    """As on a host with a read-only mount."""

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WAIT_FOR_FILES_S", 0.2)
        if mesh.world.rank == 1:
            patch.setattr(Path, "touch", refuse)
        with (
            pytest.raises(
                UserError, match=r"rank 1 on host \S+ cannot write in .*: Read-only file"
            ),
            RunFolder(config(tmp_path), mesh),
        ):
            pass


@distributed(Layout(dp=2))
def test_a_folder_that_appears_late_is_shared(mesh: Mesh, tmp_path: Path) -> None:
    """A network file system may show a new folder to other hosts with a delay."""
    is_dir, seen_at = Path.is_dir, time.monotonic() + 0.3

    def late(path: Path) -> bool:
        return is_dir(path) and (".handshake" not in path.name or time.monotonic() > seen_at)

    with pytest.MonkeyPatch.context() as patch:
        if mesh.world.rank == 1:
            patch.setattr(Path, "is_dir", late)
        with RunFolder(config(tmp_path), mesh) as folder:
            assert folder.path.is_dir()
    any_rank(mesh, False)
    assert {path.name for path in (tmp_path / "test").iterdir()} == {".lock", "checkpoints"}


@distributed(ONE_RANK, Layout(dp=2))
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_refused_launch_changes_nothing(
    mesh: Mesh, tmp_path: Path, resume: Literal["auto", "never"]
) -> None:
    """A previous exit.json stays, and no new one is written."""
    for finished in (True, False):
        directory = tmp_path / str(finished)
        if finished and mesh.world.rank == 0:
            plant_finished_run(directory)
        any_rank(mesh, False)
        with pytest.raises(UserError), RunFolder(config(directory, resume), mesh):
            raise UserError
        any_rank(mesh, False)
        names = {"checkpoints", ".lock"} | ({"exit.json"} if finished else set())
        assert {path.name for path in (directory / "test").iterdir()} == names
        assert not finished or (directory / "test" / "exit.json").read_text() == OLD


@distributed(ONE_RANK)
def test_a_launch_replaces_the_exit_json_of_the_previous_one(mesh: Mesh, tmp_path: Path) -> None:
    """Training removes the old exit.json, so there is none after kill -9.

    A stop or crash before the first step records the step of the newest checkpoint.
    """
    plant_finished_run(tmp_path)
    (tmp_path / "tokenizer").write_text("")
    with pytest.raises(SystemExit), RunFolder(config(tmp_path), mesh):
        raise SystemExit(143)
    assert (report(tmp_path)["code"], report(tmp_path)["step"]) == (143, 7)
    with pytest.raises(KeyError), RunFolder(config(tmp_path), mesh):
        raise KeyError("first")
    assert report(tmp_path)["reason"] == "KeyError: 'first'"
    with pytest.raises(UserError), RunFolder(config(tmp_path), mesh) as folder:  # noqa: PT012
        folder.begin(tmp_path / "tokenizer")
        assert not (tmp_path / "test" / "exit.json").exists()
        raise UserError("a token id out of range")
    assert report(tmp_path)["code"] == 2
    assert report(tmp_path)["reason"] == "UserError: a token id out of range"


@distributed(ONE_RANK)
def test_a_rollback_writes_nothing_that_a_full_disk_could_refuse(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Training goes on in the folder as it is."""
    (tmp_path / "tokenizer").write_text("")
    with RunFolder(config(tmp_path), mesh) as folder, pytest.MonkeyPatch.context() as patch:
        folder.begin(tmp_path / "tokenizer")
        patch.setattr(Path, "write_bytes", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        folder.begin(tmp_path / "tokenizer")


@distributed(ONE_RANK)
@pytest.mark.parametrize(
    ("settings", "saved_step", "expected"),
    [
        ({"stop_at_step": 3}, 2, "run.stop_at_step=3 run.resume=must"),
        ({"stop_at_step": 3}, 3, "run.resume=must run.stop_at_step=null"),
        ({"stop_at_step": 3}, 8, "run.resume=must run.stop_at_step=null"),
        ({"resume": "must"}, 2, "run.stop_at_step=3 run.resume=auto"),
        ({"resume": "never"}, 2, "run.stop_at_step=3 run.resume=auto"),
    ],
)
def test_the_resume_command_resumes(
    mesh: Mesh, tmp_path: Path, settings: dict[str, Any], saved_step: int, expected: str
) -> None:
    """Also if the config file has settings that would stop it at once, or start it over.

    The stop stays in force until its step is saved.
    """
    (tmp_path / "tokenizer").write_text("")
    started = config(tmp_path)
    started = dataclasses.replace(started, run=dataclasses.replace(started.run, **settings))
    with RunFolder(started, mesh) as folder, pytest.MonkeyPatch.context() as patch:
        folder.begin(tmp_path / "tokenizer")
        folder.step, folder.saved_step = 8, saved_step
        arguments = ["train.py", "run.stop_at_step=3", "run.resume=must"]
        patch.setattr("sys.argv", arguments)
        assert folder.resume_command().endswith(f" train.py {expected}")
        longer = folder.resume_command("train.train_steps=12")
        assert longer.endswith(f" train.py {expected} train.train_steps=12")


@distributed(ONE_RANK)
def test_a_launch_that_starts_over_but_never_began_would_start_over_again(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Its report is about its own step 0, and its command does not continue the old run."""
    plant_finished_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", "run.resume=never"])
        with pytest.raises(SystemExit), RunFolder(config(tmp_path, resume="never"), mesh):
            raise SystemExit(143)
    found = report(tmp_path)
    assert found["step"] == 0
    assert found["resume"].endswith(" train.py run.resume=never")


@distributed(Layout(tp=2, dp=2))
def test_the_rank_that_crashes_first_writes_exit_json(mesh: Mesh, tmp_path: Path) -> None:
    """Rank 0 may be blocked in a collective; its later error does not replace exit.json.

    The same holds during the last save, when exit.json says that the run has not ended yet.
    """
    exit_file = tmp_path / "test" / "exit.json"
    if mesh.world.rank == 0:
        plant_finished_run(tmp_path)
        (tmp_path / "tokenizer").write_text("")
    any_rank(mesh, False)
    for in_last_save in (False, True):
        with pytest.raises((KeyError, RuntimeError)), RunFolder(config(tmp_path), mesh) as folder:  # noqa: PT012
            folder.step = 3
            folder.begin(tmp_path / "tokenizer")
            if in_last_save:
                folder.announce_last_save()
            any_rank(mesh, False)
            if in_last_save:
                written = report(tmp_path)
                assert (written["code"], written["step"]) == (1, 3)
                assert written["reason"] == "has not ended yet: saving step 3"
                assert written["resume"] is not None
            else:
                assert not exit_file.exists()
            any_rank(mesh, False)
            if mesh.world.rank == 2:
                raise KeyError("the cause")
            while not exit_file.exists() or "the cause" not in exit_file.read_text():
                time.sleep(0.01)
            raise RuntimeError("Connection closed by peer")
        any_rank(mesh, False)
        assert report(tmp_path)["reason"] == "rank 2: KeyError: 'the cause'"
        assert report(tmp_path)["code"] == 1


@distributed(ONE_RANK)
def test_a_full_disk_does_not_hide_why_the_run_ends(mesh: Mesh, tmp_path: Path) -> None:
    """If exit.json cannot be written, the run still raises its own error."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with (  # noqa: PT012
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(NonFiniteError),
        RunFolder(config(tmp_path), mesh) as folder,
    ):
        patch.setattr(Path, "write_bytes", full)
        folder.announce_last_save()
        patch.undo()
        patch.setattr(Path, "rename", full)
        folder.announce_last_save()
        assert not list(folder.path.glob(".*.tmp*"))
        raise NonFiniteError(3, "nothing helps")


@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("ending", ["finished", "signal", "not finite"])
def test_exit_json_comes_before_wandb_and_pruning(
    mesh: Mesh, corpus: Path, tmp_path: Path, ending: str
) -> None:
    """Whatever may delay the end of a run comes after exit.json."""
    overrides = ["evaluate.interval=0", "train.max_consecutive_skips=0", "checkpoint.keep=1"]
    overrides += ["run.stop_at_step=5", "checkpoint.save_interval=3", "checkpoint.async_save=false"]
    run_config = changed(
        parse_config(settings(corpus, tmp_path, *overrides)),
        parallel={"tensor_model_parallel_size": mesh.tp.size},
    )
    seen: list[tuple[str, Any]] = []
    prune, finish = saving_module.prune_checkpoints, metrics_module.WandbForwarder.finish
    exit_file = tmp_path / "test" / "exit.json"

    def observe(what: str) -> None:
        seen.append((what, report(tmp_path)["code"] if exit_file.exists() else None))

    def watched_prune(folder: Path, **keywords: Any) -> None:
        observe("prune")
        prune(folder, **keywords)

    def watched_finish(view: Any, *, failed: bool) -> None:
        observe("wandb")
        finish(view, failed=failed)

    signals = StopSignals()
    code = {"finished": 0, "signal": 143, "not finite": 5}[ending]
    with (
        pytest.MonkeyPatch.context() as patch,
        poisoned(mesh, range(24, 10**6) if ending == "not finite" else range(0)),
        RunFolder(run_config, mesh) as folder,
    ):
        patch.setattr(saving_module, "prune_checkpoints", watched_prune)
        patch.setattr(metrics_module.WandbForwarder, "finish", watched_finish)
        if ending == "signal":
            agreed = signals.agreed
            patch.setattr(
                signals, "agreed", lambda sums: signal.SIGTERM if folder.step == 3 else agreed(sums)
            )
        if ending == "not finite":
            with pytest.raises(NonFiniteError):
                train(run_config, mesh, folder, signals)
        else:
            assert train(run_config, mesh, folder, signals) == code
    if mesh.world.rank == 0:
        assert seen[0] == ("prune", None)  # after the save at step 3
        assert seen[-1] == ("wandb", code)
        assert ending == "not finite" or seen[-2] == ("prune", code)


@distributed(ONE_RANK)
def test_a_signal_handler_opens_no_file(mesh: Mesh, tmp_path: Path) -> None:
    """It may have interrupted a write to the same file."""
    signals = StopSignals()
    signals.training()
    with RunFolder(config(tmp_path), mesh):
        before = (tmp_path / "test" / ".lock").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.open", None)
            patch.setattr(Path, "open", None)
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert (tmp_path / "test" / ".lock").read_bytes() == before


def _without_flock_across_hosts(patch: pytest.MonkeyPatch) -> None:
    """Simulate a file system whose locks hold on one host only, with short waits."""
    patch.setattr(lock_module.fcntl, "flock", lambda file, how: None)
    patch.setattr(lock_module, "_HEARTBEAT_S", 0.1)
    patch.setattr(lock_module, "_WATCH_S", 1.0)


@distributed(ONE_RANK)
def test_a_second_host_is_refused_where_locks_hold_on_one_host_only(
    mesh: Mesh, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        _without_flock_across_hosts(patch)
        stack.enter_context(RunFolder(config(tmp_path), mesh))
        patch.setattr(lock_module.socket, "gethostname", lambda: "another")
        lock = tmp_path / "test" / ".lock"
        before = lock.read_bytes()
        with (
            pytest.raises(UserError, match="is in use by process"),
            RunFolder(config(tmp_path), mesh),
        ):
            pass
        assert lock.read_bytes() == before


@distributed(ONE_RANK)
@pytest.mark.parametrize("ending", ["killed", "released"])
def test_a_host_takes_over_from_one_that_has_ended(mesh: Mesh, tmp_path: Path, ending: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _without_flock_across_hosts(patch)
        folder = RunFolder(config(tmp_path), mesh)
        with folder:
            held = (tmp_path / "test" / ".lock").read_bytes()
        if ending == "killed":
            (tmp_path / "test" / ".lock").write_bytes(held)
        patch.setattr(lock_module.socket, "gethostname", lambda: "another")
        messages: list[str] = []
        patch.setattr(lock_module.logger, "info", lambda text, *_: messages.append(text))
        with RunFolder(config(tmp_path), mesh):
            assert any("checking for" in text for text in messages) == (ending == "killed")


@distributed(ONE_RANK)
def test_a_restart_that_dies_early_does_not_forget_that_the_launch_has_trained(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Otherwise the next attempt would start over with run.resume=never."""
    folder = tmp_path / "test"
    folder.mkdir()
    lock = lock_module.FolderLock(folder, is_restart=False)
    lock.write_lock_owner(has_begun=True)
    lock.release()
    for _ in range(2):
        lock = lock_module.FolderLock(folder, is_restart=True)
        assert lock.continues_launch
        lock.release()


@pytest.mark.parametrize(("rank", "printed"), [("0", "no disk\n"), ("3", "[rank 3] no disk\n")])
def test_an_error_of_one_rank_is_printed_by_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, printed: str
) -> None:
    """Without torchrun no other process prints it; a rank above 0 waits first."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise UserError("no disk")
    assert (ended.value.code, capsys.readouterr().err) == (2, printed)
    assert bool(waits) == (rank != "0")
