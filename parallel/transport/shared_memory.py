"""Memory that the ranks of a group on one host share, and the semaphores that order its use.

[Note: two slots, one wait]
Each rank has two slots, which only it writes, and a semaphore for each peer. A collective is a
series of steps, cut so that a rank's part of a step fits into a slot. In step k a rank writes its
slot k mod 2, posts its semaphore for each peer, waits for each peer's post, and reads the slots.
It may write slot k mod 2 again in step k + 2: it has then waited for all peers in step k + 1, and a
peer posts in step k + 1 only after it has read in step k.

The semaphores are POSIX semaphores inside the shared memory, called through ctypes. sem_post and
sem_trywait synchronize memory, so this is correct on processors that reorder loads and stores too,
such as ARM.

[Note: lifetime]
The memory has no name in any file system and does not use /dev/shm, which is small in many
containers: rank 0 creates it with memfd_create, the others open it through rank 0's /proc entry,
and the kernel frees it with the last process that maps it. Each rank reserves its slots first, so
that a lack of memory is an error then and not a fault later. A waiting rank checks every few
milliseconds through pidfds whether a peer has ended. It records that peer's number in all its
groups before it ends too, so that ranks of other groups can name the first one.
"""

import ctypes
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
_LINE_BYTES = 128  # for a semaphore or a text: two cache lines, which processors fetch together
# A waiting rank first polls, then yields the processor, then sleeps for a growing time.
_NUM_POLLS = 15
_YIELD_FOR_S, _SLEEP_FRACTION, _MAX_SLEEP_S = 1e-3, 0.05, 1e-3
_CHECK_PEERS_EVERY_S = 5e-3

_libc = ctypes.PyDLL(None)  # without releasing the interpreter's lock: its calls here never block
_Line = ctypes.c_char * _LINE_BYTES


class PeerLostError(dist.DistBackendError):
    """The process of another rank has ended during the run."""


class SharedMemory:
    """A group's shared memory, seen by its rank `rank`; every rank creates it at the same time.

    `pids` are the processes of the group's ranks, `global_ranks` their ranks in the whole run, for
    messages. Raises OSError if the memory is not available; the others must not use it then.
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
        self.peers = [peer for peer in range(self.ranks) if peer != rank]
        self._pids, self._global_ranks = pids, global_ranks
        self._timeout_s = timeout.total_seconds()
        self._step, self._failure = 0, ""
        self._ended = select.poll()
        self._peer_of: dict[int, int] = {}
        for peer in self.peers:
            pidfd = os.pidfd_open(pids[peer])
            weakref.finalize(self, os.close, pidfd)
            self._peer_of[pidfd] = peer
            self._ended.register(pidfd, select.POLLIN)
        # A semaphore for each sender and receiver; then three lines per rank: its call in even
        # steps, its call in odd steps, the rank it has found lost.
        num_lines = self.ranks * (self.ranks + 3)
        self._slots_at = -(-num_lines * _LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = self._map(store)
        lines = [_Line.from_buffer(self._memory, i * _LINE_BYTES) for i in range(num_lines)]
        rows = [lines[first : first + self.ranks] for first in range(0, num_lines, self.ranks)]
        *self._semaphores, even_calls, odd_calls, self._lost = rows
        self._calls = (even_calls, odd_calls)
        self._slots: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        self._all.add(self)

    def _map(self, store: Store) -> mmap.mmap:
        """Map the memory and reserve this rank's part."""
        own_bytes = 2 * SLOT_BYTES
        own_at = self._slots_at + self.rank * own_bytes
        if self.rank == 0:
            descriptor = os.memfd_create("microtron")
            os.ftruncate(descriptor, self._slots_at + self.ranks * own_bytes)
            own_bytes, own_at = self._slots_at + own_bytes, 0
        else:
            path = f"/proc/{self._pids[0]}/fd/{store.get('memory').decode()}"
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        os.posix_fallocate(descriptor, own_at, own_bytes)
        memory = mmap.mmap(descriptor, 0)
        if self.rank == 0:
            for pair in range(self.ranks**2):
                is_shared, value = 1, 0
                _libc.sem_init(_Line.from_buffer(memory, pair * _LINE_BYTES), is_shared, value)
            store.set("memory", str(descriptor))
        return memory

    def next_slots(self, dtype: torch.dtype) -> list[Tensor]:
        """Begin a step; return the slots of all ranks. This rank may write its own."""
        if self._failure:
            raise dist.DistBackendError(f"an earlier collective has failed: {self._failure}")
        self._step += 1
        key = dtype, self._step % 2
        if key not in self._slots:
            count, first = SLOT_BYTES // dtype.itemsize, self._slots_at + key[1] * SLOT_BYTES
            self._slots[key] = [
                torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)
                for offset in range(first, len(self._memory), 2 * SLOT_BYTES)
            ]
        return self._slots[key]

    def exchange(self, call: str) -> None:
        """Announce that this rank's slot is written, and wait until all slots may be read.

        `call` describes the collective. Raises DistBackendError if a peer's differs, if a peer has
        ended, and after the timeout.
        """
        calls = self._calls[self._step % 2]
        calls[self.rank].value = call.encode()
        try:
            for peer in self.peers:
                _libc.sem_post(self._semaphores[self.rank][peer])
            self._wait()
        except BaseException:  # Ctrl-C too: posts that nobody took would release the next call
            self._failure = self._failure or "an earlier collective was interrupted"
            raise
        for peer in self.peers:
            if (other := calls[peer].value.decode()) != call:
                ours, theirs = self._global_ranks[self.rank], self._global_ranks[peer]
                self._fail(f"rank {ours} calls {call}, and rank {theirs} calls {other}")

    def _wait(self) -> None:
        waiting, ended, num_polls = self.peers, list[int](), 0
        began, check_after_s = time.monotonic(), 0.0
        while waiting := [p for p in waiting if _libc.sem_trywait(self._semaphores[p][self.rank])]:
            # Polled once more after a peer's end, as it may have posted before.
            if lost := [peer for peer in waiting if peer in ended]:
                self._raise_peer_lost(lost[0])
            num_polls += 1
            if num_polls < _NUM_POLLS:
                continue
            waited_s = time.monotonic() - began
            if waited_s < _YIELD_FOR_S:
                os.sched_yield()
            else:
                time.sleep(min(waited_s * _SLEEP_FRACTION, _MAX_SLEEP_S))
            if waited_s > check_after_s:
                ended = [self._peer_of[pidfd] for pidfd, _ in self._ended.poll(0)]
                check_after_s = waited_s + _CHECK_PEERS_EVERY_S
            if waited_s > self._timeout_s:
                late = [self._global_ranks[peer] for peer in waiting]
                self._fail(f"no answer from ranks {late} in {self._timeout_s:g} s")

    def _raise_peer_lost(self, peer: int) -> NoReturn:
        ended = self._global_ranks[peer]
        first = int(self._lost[peer].value or ended)  # it may have ended because of another
        for memory in list(self._all):
            memory._lost[memory.rank].value = str(first).encode()
        cause = f", after rank {first} had" if first != ended else ""
        failure = f"connection lost: rank {ended} (process {self._pids[peer]}) has ended{cause}"
        self._fail(failure, PeerLostError)

    def _fail(
        self, failure: str, error: type[dist.DistBackendError] = dist.DistBackendError
    ) -> NoReturn:
        self._failure = failure
        raise error(failure)
