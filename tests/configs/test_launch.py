"""The launch command that resume commands begin with."""

import sys
from pathlib import Path

import pytest

from configs.launch import launch_command, torchrun_options

PROGRAM = ["train.py", "config=gpt_small", "run.name=a b"]


@pytest.mark.parametrize(
    "options",
    [
        ["--standalone", "--nproc-per-node=8"],
        ["--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend=c10d", "--rdzv-endpoint=h:1"],
        [],
    ],
)
@pytest.mark.parametrize(
    "launcher", [["python", "/env/bin/torchrun"], ["python3", "-m", "torch.distributed.run"]]
)
def test_torchrun_keeps_its_options(launcher: list[str], options: list[str]) -> None:
    """Verbatim: nodes, ranks and rendezvous, as the launch had them."""
    assert torchrun_options([*launcher, *options, *PROGRAM], PROGRAM) == options


def test_another_parent_has_no_options() -> None:
    """A shell, a test runner, or torchrun with another program, such as a wrapper script."""
    for command in (["bash"], ["python", "-m", "pytest"], ["python", "torchrun", "wrapper.sh"], []):
        assert torchrun_options(command, PROGRAM) is None


@pytest.mark.parametrize(
    ("world", "expected"),
    [("4", "torchrun --nproc-per-node 4"), ("8", "torchrun --nnodes 2 --nproc-per-node 4")],
)
def test_the_environment_tells_the_ranks_elsewhere(
    monkeypatch: pytest.MonkeyPatch, world: str, expected: str
) -> None:
    """Where the parent's command line cannot be read, or is not torchrun's."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launch_command() == "python"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", world)
    assert launch_command() == expected

    def unreadable(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert launch_command() == expected


def test_the_command_line_of_the_parent_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments with spaces are quoted."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", PROGRAM)
    parent = ["python", "torchrun", "--standalone", "--log-dir=a b", *PROGRAM, ""]
    monkeypatch.setattr(Path, "read_bytes", lambda _: "\0".join(parent).encode())
    assert launch_command() == "torchrun --standalone '--log-dir=a b'"
