"""Ranks know each other from the start of training on."""

import time
from types import SimpleNamespace
from typing import cast

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]  # undeclared

from parallel import Heartbeats, Mesh
from parallel.transport import heartbeats


def test_the_first_heartbeat_is_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nobody knows of a rank that stops answering before its first interval ends."""
    store = HashStore()
    monkeypatch.setattr(heartbeats, "connect_store", lambda *_: store)
    ranks = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2)
        mesh = cast(Mesh, SimpleNamespace(world=world, attempt=""))
        ranks.append(Heartbeats(mesh, interval_s=100.0))
        ranks[rank].publish({"step": rank})
    expected = {0: {"step": 0}, 1: {"step": 1}}
    deadline = time.monotonic() + 10
    while any(one.board != expected for one in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for one in ranks:
        one.close()
