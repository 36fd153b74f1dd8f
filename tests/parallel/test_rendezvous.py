"""Ranks meet over a store that earlier attempts have used, and agree on their device."""

import os
import re
import signal
import socket
import time
import uuid
from multiprocessing.queues import Queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import TCPStore

from parallel.transport import rendezvous
from parallel.transport.rendezvous import _decide, join_attempt
from tests.fork_server import fork_server
from tests.runs import finish, settings, start


def _join(rank: int, world_size: int, port: int, has_agent_store: bool, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(has_agent_store),
        # As if the agent of rank 0 had been replaced: it counts from 0 again.
        "TORCHELASTIC_RESTART_COUNT": str(rank),
    }
    name, store, device, is_restart = join_attempt("auto", 0, 0)
    assert store is not None
    if answers is not None:
        if rank == 1:
            store.set("late", "")
        store.wait(["late"])  # the store is still served
        answers.put((rank, name, device, is_restart))
        answers.close()
        answers.join_thread()


def test_every_attempt_has_its_own_name() -> None:
    """Restart counts and leftovers of killed attempts in the store do not matter."""
    context, world_size = fork_server(), 3
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    answers: Queue[tuple[int, str, str, bool]] = context.Queue()
    names = set()

    def begin(rank: int, to: Any) -> Any:
        process = context.Process(target=_join, args=(rank, world_size, store.port, True, to))
        process.start()
        return process

    # In a first attempt rank 2 never comes, and the others are killed while they wait.
    broken_off = [begin(rank, None) for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not store.check(["hello_1"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    for process in broken_off:
        assert process.exitcode is None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    for _ in range(2):
        processes = [begin(rank, answers) for rank in range(world_size)]
        joined = sorted(answers.get(timeout=300) for _ in processes)
        for process in processes:
            process.join()
        name = joined[0][1]
        assert joined == [(rank, name, "cpu", True) for rank in range(world_size)]
        names.add(name)
    assert len(names) == 2


def test_ranks_meet_without_a_launcher_store() -> None:
    """Rank 0 serves the store, also after the rendezvous."""
    context = fork_server()
    answers: Queue[tuple[int, str, str, bool]] = context.Queue()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_join, args=(r, 2, port, False, answers)) for r in (0, 1)]
    for process in processes:
        process.start()
    joined = sorted(answers.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    assert joined == [(rank, joined[0][1], "cpu", True) for rank in (0, 1)]


def _rank(num_gpus: int, gpu: int = 0, host: str = "a", choice: str = "auto") -> dict[str, Any]:
    return {
        "choice": choice,
        "host": host,
        "num_gpus": num_gpus,
        "gpu": f"UUID {gpu} of {host}",
        "restarts": 0,
    }


@pytest.mark.parametrize(
    ("ranks", "device"),
    [
        ([_rank(0), _rank(0)], "cpu"),
        ([_rank(2), _rank(2, 1)], "cuda"),
        ([_rank(2, choice="cpu"), _rank(0, choice="cpu")], "cpu"),
        ([_rank(1), _rank(1, host="b")], "cuda"),
        # Slurm may show each rank only its own GPU.
        ([_rank(1), _rank(1, 1)], "cuda"),
    ],
)
def test_device_for_all_ranks(ranks: list[dict[str, Any]], device: str) -> None:
    """Each rank gets its own GPU; all use the CPU if no rank has a GPU or if requested."""
    assert _decide(ranks) == {"device": device, "problem": None, "restarts": 0}


@pytest.mark.parametrize(
    ("ranks", "setting", "lacking"),
    [
        (
            [_rank(2), _rank(2, 1), _rank(2, 0)],
            "auto",
            "ranks [2] (host a) have no GPU of their own;",
        ),
        ([_rank(1), _rank(0, host="b")], "auto", "ranks [1] (host b) have no GPU;"),
        ([_rank(0, choice="cuda")], "cuda", "ranks [0] (host a) have no GPU;"),
        (
            [_rank(1), _rank(1, host="b", choice="cpu")],
            "auto",
            "ranks [1] (host b) have no GPU of their own or another train.device;",
        ),
        (
            [_rank(0, choice="cpu"), _rank(0, host="b")],
            "cpu",
            "ranks [0, 1] (host a, b) have no GPU or another train.device;",
        ),
    ],
)
def test_no_device_for_all_ranks(ranks: list[dict[str, Any]], setting: str, lacking: str) -> None:
    """One line that names the setting, the ranks and their hosts."""
    assert _decide(ranks)["problem"] == (
        f"train.device={setting} on rank 0, but {lacking} start one rank per GPU, or set "
        "train.device=cpu for all ranks"
    )


@pytest.mark.parametrize("num_distinct", [1, 2])
def test_a_gpu_is_known_by_its_uuid(monkeypatch: pytest.MonkeyPatch, num_distinct: int) -> None:
    """Slurm may show each of two ranks one GPU, as number 0; it may be the same one."""
    ranks = list[dict[str, Any]]()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(rendezvous, "_decide", lambda facts: ranks.extend(facts) or _decide(facts))
    for rank in range(2):
        gpu = SimpleNamespace(uuid=uuid.UUID(int=rank % num_distinct))
        monkeypatch.setattr("torch.cuda.get_device_properties", {0: gpu}.get)
        assert join_attempt("auto", 1, 0)[2] == "cuda"
    problem = _decide(ranks)["problem"]
    assert problem is None if num_distinct == 2 else "ranks [1] (host " in problem


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_missing_gpu_is_one_line(corpus: Path, tmp_path: Path, ranks: int) -> None:
    """The error comes before the process group, with exit code 2."""
    process = start(ranks, settings(corpus, tmp_path, "train.device=cuda"))
    output = finish(process, expected=2 if ranks == 1 else 1)
    assert f"train.device=cuda on rank 0, but ranks {[*range(ranks)]} (host " in output
    assert not re.findall(r"^\[rank\d\]:", output, re.MULTILINE)
    if ranks == 1:
        assert len(output.splitlines()) == 1
    assert not (tmp_path / "test").exists()
