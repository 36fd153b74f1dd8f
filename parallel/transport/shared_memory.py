"""Memory that the ranks of a group on one host share, and how they meet over it.

[Note: two slots, one meeting]
Each rank has two slots, which it alone writes, and a counter. A collective is a row of steps, cut
so that what a rank gives in one fits into a slot; the steps of a group are numbered from 1 on and
step k uses slot k mod 2 of every rank. In each, a rank

    writes its slot    sets its counter to k    waits until all counters are at least k    reads

The counters say that all slots are full. Nothing has to say that they are read, that is, may be
written again: slot k mod 2 was last used in step k - 2. Who writes it in step k has met the others
in k - 1, and each of them had set its counter to k - 1 only after it had read in k - 2.

Between setting a counter and seeing it stands no lock and no fence, so what was written before must
be visible to who sees the counter, and what was read before must have been read. x86 keeps the
order of stores and of loads, no store overtakes a load, and an aligned word is written at once.
Other processors promise less. Beside its counter a rank says what it calls, so that ranks that call
different things get an error and not each other's bytes.

[Note: nothing is left, nobody waits in vain]
The memory has no name in any file system: rank 0 makes it (memfd_create), the others open it
through rank 0's /proc entry, and it ends with the last process that maps it, however that ends. So
/dev/shm, which is small in many containers, does not matter. Each rank reserves its own slots, so
that a lack of memory is an error at the start and not a fault later. A process that waits looks
every few milliseconds whether a peer has ended: its pidfd says so from the moment of death, reaped
or not. A peer that is only stopped is waited for, up to the timeout.

A rank that finds a peer ended writes that peer's number into its own line of all its groups before
it ends too. Ranks that share no group with the first one read it there, and name it.
"""

import mmap
import os
import select
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import ClassVar, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

SLOT_BYTES = 1 << 20
_LINE_BYTES = 128  # two cache lines, as processors fetch neighbours together
_LINE_WORDS = _LINE_BYTES // 8
# Waiting: look at once again, then let others have the processor, then sleep ever longer.
_SPINS = 50
_YIELD_FOR_S, _SLEEP_SHARE, _LONGEST_SLEEP_S = 1e-3, 0.05, 1e-3
_LOOK_AT_PEERS_EVERY_S = 5e-3
# What ranks can be found to call; in the order of their numbers in memory.
CALLS = ("all_gather", "reduce_scatter", "all_reduce sum", "all_reduce max")


_COUNTER, _SAYS, _LOST = 0, 1, 3  # words of a rank's line; the second is two words


class PeerLostError(dist.DistBackendError):
    """The process of another rank has ended in the middle of the run."""


class SharedMemory:
    """The memory of a group, as its rank number `rank` sees it; `pids` are the ranks' processes.

    `global_ranks` are their numbers in the whole run, for messages. Every rank of the group makes
    one at the same time. Raises OSError where it cannot be had; then it is of no use to the others
    either.
    """

    _all: ClassVar["weakref.WeakSet[SharedMemory]"] = weakref.WeakSet()  # of this process

    def __init__(
        self,
        store: Store,
        rank: int,
        pids: Sequence[int],
        timeout: timedelta,
        global_ranks: Sequence[int],
    ) -> None:
        self.rank, self.ranks = rank, len(pids)
        self._global_ranks = global_ranks
        self._pids, self._timeout_s = pids, timeout.total_seconds()
        self._step, self._failure = 0, ""
        self._descriptors: list[int] = []
        weakref.finalize(self, _close, self._descriptors)
        self._slots_at = -(-self.ranks * _LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        # Kept open, as the others open it through our /proc entry.
        descriptor = self._make(store) if rank == 0 else self._open(store)
        own_bytes = 2 * SLOT_BYTES
        os.posix_fallocate(descriptor, self._slots_at + rank * own_bytes, own_bytes)
        self._memory = mmap.mmap(descriptor, self._slots_at + self.ranks * own_bytes)
        self._words = memoryview(self._memory)[: self._slots_at].cast("q")
        self._slots: dict[torch.dtype, list[list[Tensor]]] = {}
        self._peers = [peer for peer in range(self.ranks) if peer != rank]
        self._ends = select.poll()
        self._peer_of: dict[int, int] = {}
        for peer in self._peers:
            pidfd = os.pidfd_open(pids[peer])
            self._descriptors.append(pidfd)
            self._peer_of[pidfd] = peer
            self._ends.register(pidfd, select.POLLIN)
        self._all.add(self)

    def _make(self, store: Store) -> int:
        offer = ""
        try:
            descriptor = os.memfd_create("microtron")
            self._descriptors.append(descriptor)
            os.ftruncate(descriptor, self._slots_at + 2 * self.ranks * SLOT_BYTES)
            os.posix_fallocate(descriptor, 0, self._slots_at)
            offer = str(descriptor)
        finally:
            store.set("memory", offer)
        return descriptor

    def _open(self, store: Store) -> int:
        offer = store.get("memory").decode()
        if not offer:
            raise OSError("rank 0 has none to share")
        descriptor = os.open(f"/proc/{self._pids[0]}/fd/{offer}", os.O_RDWR | os.O_CLOEXEC)
        self._descriptors.append(descriptor)
        return descriptor

    def next_slots(self, dtype: torch.dtype) -> list[Tensor]:
        """Begin a step; returns the slot of each rank, of which only the own one is free yet."""
        if self._failure:
            raise dist.DistBackendError(f"an earlier collective has failed: {self._failure}")
        self._step += 1
        if dtype not in self._slots:
            self._slots[dtype] = [
                [self._slot(dtype, rank, parity) for rank in range(self.ranks)] for parity in (0, 1)
            ]
        return self._slots[dtype][self._step % 2]

    def _slot(self, dtype: torch.dtype, rank: int, parity: int) -> Tensor:
        offset = self._slots_at + (2 * rank + parity) * SLOT_BYTES
        count = SLOT_BYTES // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)

    def meet(self, call: str, num_bytes: int) -> None:
        """Say that the own slot is full, and wait until those of all are, to be read now.

        `call` and the `num_bytes` of its tensor must be the same on all ranks. Raises
        DistBackendError if they aren't, if a peer has ended and after the timeout.
        """
        words, step, line = self._words, self._step, self.rank * _LINE_WORDS
        says = num_bytes * len(CALLS) + CALLS.index(call)
        said_at = _SAYS + step % 2  # a peer may be one step ahead, and says what it calls there
        words[line + said_at] = says
        words[line] = step
        self._wait()
        for peer in self._peers:
            if (theirs := words[peer * _LINE_WORDS + said_at]) != says:
                their_bytes, their_call = divmod(theirs, len(CALLS))
                self._fail(
                    f"rank {self._global_ranks[self.rank]} calls {call} of {num_bytes} bytes, and "
                    f"rank {self._global_ranks[peer]} calls {CALLS[their_call]} of {their_bytes} "
                    "bytes"
                )

    def _wait(self) -> None:
        words, step = self._words, self._step
        counters = [peer * _LINE_WORDS for peer in self._peers]
        for _ in range(_SPINS):
            if all(words[counter] >= step for counter in counters):
                return
        began, look_after_s = time.monotonic(), 0.0
        while not all(words[counter] >= step for counter in counters):
            waited_s = time.monotonic() - began
            if waited_s < _YIELD_FOR_S:
                os.sched_yield()
            else:
                time.sleep(min(waited_s * _SLEEP_SHARE, _LONGEST_SLEEP_S))
            if waited_s > look_after_s:
                self._look_at_peers(waited_s)
                look_after_s = waited_s + _LOOK_AT_PEERS_EVERY_S

    def _look_at_peers(self, waited_s: float) -> None:
        for pidfd, _ in self._ends.poll(0):
            peer = self._peer_of[pidfd]
            # Read after its end: it may have done its part before.
            if self._words[peer * _LINE_WORDS] < self._step:
                self._lose(peer)
        if waited_s > self._timeout_s:
            words, ranks = self._words, enumerate(self._global_ranks)
            late = [rank for index, rank in ranks if words[index * _LINE_WORDS] < self._step]
            self._fail(f"no answer from ranks {late} in {self._timeout_s:g} s")

    def _lose(self, peer: int) -> NoReturn:
        ended = self._global_ranks[peer]
        first = self._words[peer * _LINE_WORDS + _LOST] - 1  # which that peer has lost, if any
        lost = first if first >= 0 else ended
        for memory in list(self._all):
            memory._words[memory.rank * _LINE_WORDS + _LOST] = lost + 1
        self._failure = (
            f"connection lost: rank {ended} (process {self._pids[peer]}) has ended"
            f"{f', after rank {lost} had' if lost != ended else ''}"
        )
        raise PeerLostError(self._failure)

    def _fail(self, failure: str) -> NoReturn:
        self._failure = failure
        raise dist.DistBackendError(failure)


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
