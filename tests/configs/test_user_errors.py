"""One line for errors that the user can fix, a traceback for all others."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train
from checkpoints import CheckpointError
from configs import Config, TrainConfig, UserError, machine_errors_as_user_errors, parse_config
from tests.runs import settings
from training import divergence
from training.divergence import NonFiniteError
from training.state import RunState

MESH: Any = SimpleNamespace(local_rank=0)


def _raise(error: Exception) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without other ranks and without a checkpoint."""
    monkeypatch.setattr(train, "require_same_on_all_ranks", lambda *_: None)
    monkeypatch.setattr(train, "find_own_checkpoint", lambda *_: None)


def _start(config: Config) -> None:
    train.start(config, MESH, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError("zip()"), KeyError("x"), FileNotFoundError(2, "y")])
def test_a_bug_in_the_preparation_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(train, "prepare_corpus", _raise(error))
    with pytest.raises(type(error)) as caught:
        _start(Config())
    assert caught.value is error


def test_error_of_a_cache_folder_names_its_key(corpus: Path, tmp_path: Path) -> None:
    """ENOTDIR stands for errors that root cannot provoke, such as a read-only disk."""
    (tmp_path / "file").touch()
    cache = f"data.cache_directory={tmp_path}/file/cache"
    with pytest.raises(UserError, match=rf"{cache}: Not a directory: {tmp_path}/file"):
        _start(parse_config([*settings(corpus, tmp_path), cache]))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_errors_of_the_machine_are_one_line(number: int) -> None:
    reason = os.strerror(number)
    with (
        pytest.raises(UserError, match=f"^cannot save it: {reason}: /a$"),
        machine_errors_as_user_errors("save it"),
    ):
        raise OSError(number, reason, "/a")
    with (
        pytest.raises(UserError, match=f"^cannot save it: {reason}$"),
        machine_errors_as_user_errors("save it"),
    ):
        raise OSError(number, reason)


def test_a_rollback_to_damaged_checkpoints_ends_as_non_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run has trained, so the exit code is 5 and not 2."""
    monkeypatch.setattr(divergence, "find_checkpoint", _raise(CheckpointError("all damaged")))
    run: Any = SimpleNamespace(
        config=SimpleNamespace(train=TrainConfig()),
        folder=SimpleNamespace(checkpoints=Path("none")),
        mesh=None,
    )
    with pytest.raises(NonFiniteError, match=r"step 9: .* and all damaged"):
        divergence.roll_back(run, RunState("id", step=9, skipped_in_a_row=4))
