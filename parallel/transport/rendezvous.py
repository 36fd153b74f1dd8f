"""Rendezvous of all ranks over the launcher's store, before there is a process group.

[Note: attempts]
torchrun keeps one store for all attempts of --max-restarts, and torch 2.13 does not separate them:
an attempt would read the addresses of dead processes. The restart count does not separate them
either, as the agent of a replaced node counts from 0 again. So the ranks of an attempt agree on a
random name, with which all their keys start:

    rank r                                      rank 0, until it has the facts of all
    sets hello_r to a random nonce              sets reply_(nonce) to the name, for each hello
    waits for reply_(nonce), the name           sets (name)/decision
    sets (name)/facts_r

Rank 0 may also answer a hello of an earlier attempt; nobody waits for that reply.
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

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from configs.launch import num_restarts

TIMEOUT_S = 1800.0  # until all ranks have arrived; imports may be slow
_POLL_INTERVAL_S = 0.05


class DeviceError(ValueError):
    """Not all ranks can have the requested device; raised on all ranks."""


def machine_id() -> str:
    """Identify the processes that share process numbers; host names need not be unique."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{boot.read_text()} {namespace.readlink()}" if boot.exists() else socket.gethostname()


def connect_store(attempt: str, purpose: str) -> Store | None:
    """Open a new connection to the store of an attempt's ranks; None without a launcher."""
    return PrefixStore(f"{attempt}/{purpose}", _connect()) if "RANK" in os.environ else None


def _connect() -> Store:
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    return store


def join_attempt(device: str, num_gpus: int, gpu: int) -> tuple[str, Store | None, str, bool]:
    """Meet all ranks; return the attempt's name, its store, the device type, if it is a restart.

    The caller must keep the store, which rank 0 serves if the launcher does not.
    `device` is train.device; `gpu` is this rank's choice among the `num_gpus` that it sees. Raises
    DeviceError on all ranks if they cannot agree, DistError if a rank does not arrive in time.
    """
    uses_gpu = num_gpus > 0 and device != "cpu"
    facts = {
        "choice": device,
        "host": socket.gethostname(),
        "num_gpus": num_gpus,
        # Not its number: a launcher may show each rank all GPUs of its host, or one as number 0.
        "gpu": str(torch.cuda.get_device_properties(gpu).uuid) if uses_gpu else None,
        "restarts": num_restarts(),
    }
    name, store = secrets.token_hex(8), None
    if "RANK" not in os.environ:
        decision = _decide([facts])
    else:
        store, rank = _connect(), int(os.environ["RANK"])
        if rank == 0:
            others = _gather_facts(store, name, int(os.environ["WORLD_SIZE"]))
            store.set(f"{name}/decision", json.dumps(_decide([facts, *others])))
        else:
            nonce = name
            store.set(f"hello_{rank}", nonce)
            name = store.get(f"reply_{nonce}").decode()
            store.set(f"{name}/facts_{rank}", json.dumps(facts))
        decision = json.loads(store.get(f"{name}/decision"))
    if decision["problem"]:
        raise DeviceError(decision["problem"])
    return name, store, decision["device"], decision["restarts"] > 0


def _gather_facts(store: Store, name: str, world_size: int) -> list[Any]:
    """Give all other ranks the name of the attempt; return their facts."""
    missing, started_at = list(range(1, world_size)), time.monotonic()
    while missing:
        for rank in missing:
            if store.check([f"hello_{rank}"]):
                store.set(f"reply_{store.get(f'hello_{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"{name}/facts_{rank}"])]
        if time.monotonic() - started_at > TIMEOUT_S:
            raise dist.DistNetworkError(f"ranks {missing} did not arrive within {TIMEOUT_S:g} s")
        time.sleep(_POLL_INTERVAL_S)
    return [json.loads(store.get(f"{name}/facts_{rank}")) for rank in range(1, world_size)]


def _decide(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Choose the device type for all ranks, or describe the problem; count the restarts."""
    choice = ranks[0]["choice"]
    agree = all(facts["choice"] == choice for facts in ranks)
    no_gpus = not any(facts["num_gpus"] for facts in ranks)
    is_cpu = agree and (choice == "cpu" or (choice == "auto" and no_gpus))
    lacking = [
        rank
        for rank, facts in enumerate(ranks)
        if facts["choice"] != choice
        or not facts["num_gpus"]
        or facts["gpu"] in [earlier["gpu"] for earlier in ranks[:rank]]
    ]
    hosts = ", ".join(sorted({ranks[rank]["host"] for rank in lacking}))
    missing = "no GPU of their own" if any(ranks[r]["num_gpus"] for r in lacking) else "no GPU"
    missing += "" if agree else " or another train.device"
    problem = (
        f"train.device={choice} on rank 0, but ranks {lacking} (host {hosts}) have {missing}; "
        "start one rank per GPU, or set train.device=cpu for all ranks"
    )
    return {
        "device": "cpu" if is_cpu else "cuda",
        "problem": problem if lacking and not is_cpu else None,
        "restarts": max(facts["restarts"] for facts in ranks),
    }
