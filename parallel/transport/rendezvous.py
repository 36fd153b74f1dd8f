"""Meeting the other ranks over the launcher's store, before there is a process group.

[Note: attempts]
torchrun keeps one store for all attempts of --max-restarts, and torch 2.13 does not tell them
apart: an attempt would read the addresses of the one before, whose processes are dead. Numbers of
attempts do not help, as the agent of a node that was replaced counts from 0 again. So the ranks of
an attempt agree on a random name, with which all their keys begin:

    rank r                                      rank 0, until it has the facts of all
    sets hello_r to a random nonce              sets reply_(nonce) to the name, for each hello
    waits for reply_(nonce), the name           sets (name)/decision
    sets (name)/facts_r

It may answer a hello of an earlier attempt too, but nobody waits for that reply.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

TIMEOUT_S = 1800.0  # until all ranks have arrived; importing may be slow
_POLL_INTERVAL_S = 0.05


class DeviceError(ValueError):
    """Ranks that cannot all have the device that is asked for; raised on all ranks."""


def machine_id() -> str:
    """Equal for processes that know each other by number; hosts may have the same name."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text()} {processes.readlink()}" if boot.exists() else socket.gethostname()


def connect_store(attempt: str, purpose: str) -> Store | None:
    """A connection of its own to the store of all ranks of an attempt; None without a launcher."""
    return PrefixStore(f"{attempt}/{purpose}", _connect()) if "RANK" in os.environ else None


def join_attempt(device: str, num_gpus: int, gpu: int) -> tuple[str, Store | None, str, bool]:
    """Meet all ranks; returns the attempt's name, its store, the type of device, if it restarts.

    The store must be kept: in a launcher without one rank 0 serves it, as long as it is kept there.
    `device` is train.device, and `gpu` is of the `num_gpus` that this rank sees. Raises DeviceError
    on all ranks if they cannot have the same type, DistError if a rank does not arrive in time.
    """
    facts = {
        "choice": device,
        "host": socket.gethostname(),
        "num_gpus": num_gpus,
        # A launcher may show all GPUs of a host to each of its ranks, or one to each.
        "gpu": [machine_id(), os.environ.get("CUDA_VISIBLE_DEVICES"), gpu],
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    }
    name, store, decision = "", None, _decide([facts])
    if "RANK" in os.environ:
        store = _connect()
        name, decision = _agree(store, int(os.environ["RANK"]), facts)
    if decision["problem"]:
        raise DeviceError(decision["problem"])
    return name, store, decision["device"], decision["restarts"] > 0


def _agree(store: Store, rank: int, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the attempt, and what rank 0 decides from the facts of all ranks."""
    nonce = name = secrets.token_hex(8)
    if rank == 0:
        others = _welcome(store, name, int(os.environ["WORLD_SIZE"]))
        store.set(f"{name}/decision", json.dumps(_decide([facts, *others])))
    else:
        store.set(f"hello_{rank}", nonce)
        name = store.get(f"reply_{nonce}").decode()
        store.set(f"{name}/facts_{rank}", json.dumps(facts))
    return name, json.loads(store.get(f"{name}/decision"))


def _welcome(store: Store, name: str, world_size: int) -> list[Any]:
    """Tell all other ranks the name of the attempt; returns their facts."""
    missing, started_at = list(range(1, world_size)), time.monotonic()
    while missing:
        for rank in missing:
            if store.check([f"hello_{rank}"]):
                store.set(f"reply_{store.get(f'hello_{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/facts_{rank}"])]
        if time.monotonic() - started_at > TIMEOUT_S:
            raise dist.DistNetworkError(f"ranks {missing} have not arrived in {TIMEOUT_S:g} s")
        time.sleep(_POLL_INTERVAL_S)
    return [json.loads(store.get(f"{name}/facts_{rank}")) for rank in range(1, world_size)]


def _connect() -> Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    return store


def _decide(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For all ranks: the type of device, what is wrong with it, and the number of restarts."""
    choice, lacking, taken = ranks[0]["choice"], list[int](), list[Any]()
    for rank, facts in enumerate(ranks):
        if facts["choice"] != choice or not facts["num_gpus"] or facts["gpu"] in taken:
            lacking.append(rank)
        taken.append(facts["gpu"])
    is_cpu = all(facts["choice"] == choice for facts in ranks) and (
        choice == "cpu" or (choice == "auto" and not any(facts["num_gpus"] for facts in ranks))
    )
    hosts = ", ".join(sorted({ranks[rank]["host"] for rank in lacking}))
    problem = (
        f"train.device={choice} on rank 0, but ranks {lacking} (host {hosts}) have no GPU of their "
        "own, or another train.device; start one rank for each GPU, or set train.device=cpu for all"
    )
    return {
        "device": "cpu" if is_cpu else "cuda",
        "problem": problem if lacking and not is_cpu else None,
        # The agent of a node that was replaced counts from 0 again.
        "restarts": max(facts["restarts"] for facts in ranks),
    }
