"""Heartbeats: small reports that ranks exchange next to the collectives.

A rank that waits in a collective cannot run another one. So heartbeats go through the store of the
launcher, on their own connection and, after the first, in their own thread; reading never blocks.
"""

import contextlib
import json
import logging
import threading
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from parallel.mesh import Mesh
from parallel.transport.rendezvous import connect_store

logger = logging.getLogger("microtron")

_CLOSE_TIMEOUT_S = 1.0  # for the last heartbeat to be sent


class Heartbeats:
    """The newest heartbeat of each rank, a JSON value; none on one rank or without a launcher."""

    def __init__(self, mesh: Mesh, interval_s: float) -> None:
        self.board: dict[int, Any] = {}  # by rank; replaced as a whole, never changed
        self._interval_s = interval_s
        self._rank = mesh.world.rank
        self._keys = [f"rank_{rank}" for rank in range(mesh.world.size)]
        self._beat: Any = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._store = connect_store(mesh.attempt, "heartbeats") if mesh.world.size > 1 else None

    def publish(self, beat: Any) -> None:
        """Set this rank's heartbeat. The first is sent now, a later one at the next interval."""
        self._beat = beat
        if self._store is not None and self._thread is None:
            with contextlib.suppress(DistError):  # the thread will log it
                self._store.set(self._keys[self._rank], json.dumps(beat))
            self._thread = threading.Thread(
                target=self._exchange, args=(self._store,), name="heartbeats", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Send the last heartbeat and stop."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _exchange(self, store: Store) -> None:
        is_last = False
        try:
            while not is_last:
                # Blocks until every rank has sent one.
                beats = [json.loads(beat) for beat in store.multi_get(self._keys)]
                self.board = dict(enumerate(beats))
                is_last = self._closed.wait(self._interval_s)
                store.set(self._keys[self._rank], json.dumps(self._beat))
        except DistError as error:
            # The store's host is gone; whoever depends on it will report that.
            if not is_last:
                logger.debug("heartbeats stopped: %s", error)
