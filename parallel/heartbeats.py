"""What each rank says of itself while it runs, for all ranks to read, beside the collectives.

A rank that waits in a collective cannot ask its peers what they are doing through another one. So
beats go through the store that the ranks of torchrun share, over a connection of their own and in a
thread of their own: whoever reads the board never waits for the wire.
"""

import json
import logging
import threading
from typing import Any

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from parallel.mesh import Mesh
from parallel.transport.rendezvous import connect_store

logger = logging.getLogger("microtron")

_LAST_WORD_S = 1.0  # for the last beat to get out, if the store still answers


class Heartbeats:
    """The board of all ranks' beats, which are JSON; alone, or without torchrun, an empty one."""

    def __init__(self, mesh: Mesh, interval_s: float) -> None:
        self.board: dict[int, Any] = {}  # the newest beat of each rank; replaced, never changed
        self._interval_s = interval_s
        self._rank = mesh.world.rank
        self._keys = [f"rank_{rank}" for rank in range(mesh.world.size)]
        self._beat: Any = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        store = connect_store(mesh.attempt, "heartbeats") if mesh.world.size > 1 else None
        if store is not None:
            self._thread = threading.Thread(
                target=self._exchange, args=(store,), name="heartbeats", daemon=True
            )

    def publish(self, beat: Any) -> None:
        """Have this rank's beat on the board at the next exchange; the first call begins them."""
        self._beat = beat
        if self._thread is not None and self._thread.ident is None:
            self._thread.start()

    def close(self) -> None:
        """Leave the last beat on the board, and read it no more."""
        self._closed.set()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join(_LAST_WORD_S)

    def _exchange(self, store: Store) -> None:
        is_last = False
        try:
            while not is_last:
                is_last = self._closed.wait(self._interval_s)
                store.set(self._keys[self._rank], json.dumps(self._beat))
                if not is_last:
                    # Waits until each rank has been here once.
                    beats = [json.loads(beat) for beat in store.multi_get(self._keys)]
                    self.board = dict(enumerate(beats))
        except DistError as error:
            # The launcher, or rank 0's host, is gone; those who need it will say so.
            if not is_last:
                logger.debug("no more heartbeats: %s", error)
