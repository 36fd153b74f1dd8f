"""The ranks of a launch, and the launch command that resume commands begin with."""

import sys
from pathlib import Path

import pytest

from configs.launch import (
    first_node,
    launch_command,
    launch_id,
    num_restarts,
    torchrun_options,
    use_slurm_tasks,
)

PROGRAM = ["train.py", "config=gpt_small", "run.name=a b"]

# What srun sets for the third of eight tasks on two nodes, in a job that was requeued twice.
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "rack1n[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_CPUS_PER_TASK": "6",
    "SLURM_GTIDS": "0,1,2,3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "2",
}


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


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a,b[1-2]", "a"),
        ("node[007-009,12],x", "node007"),
        ("rack[2-4]n[5,7]-ib,x", "rack2n5-ib"),
    ],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_tasks_of_srun_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun; the store is on the first node, and each step of a job has its own port."""
    environment = dict(SLURM)
    use_slurm_tasks(environment)
    assert environment == SLURM | {
        "RANK": "2",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "rack1n07",
        "MASTER_PORT": "25345",
    }
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch_command() == "srun --nodes=2 --ntasks=8 --cpus-per-task=6 python"
    assert (launch_id(), num_restarts()) == ("Slurm job 12345", 2)


@pytest.mark.parametrize(
    "environment",
    [
        SLURM | {"RANK": "0"},  # torchrun as a task
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script without srun
    ],
)
def test_other_programs_under_slurm_keep_their_environment(environment: dict[str, str]) -> None:
    before = dict(environment)
    use_slurm_tasks(environment)
    assert environment == before
