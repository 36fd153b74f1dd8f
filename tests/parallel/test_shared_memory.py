"""Collectives through shared memory are exact, and raise errors where gloo does."""

import errno
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from ops.torch_private import all_gather_single, reduce_scatter_single
from parallel import Mesh, gather_json
from parallel.transport.backend import _warn_once, cpu_backend
from parallel.transport.shared_memory import SLOT_BYTES
from tests.distributed import Layout, distributed

TWO, THREE, FOUR = (Layout(tp=ranks, shared_memory=True) for ranks in (2, 3, 4))
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.int32, torch.int64)
RAISED_WITHIN_S = 2.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def is_shared(group: dist.ProcessGroup | None) -> bool:
    return type(group).__name__ == "_SharedMemoryGroup"


def sizes(dtype: torch.dtype) -> list[int]:
    """Numbers of elements: none, one, odd numbers, a small message, more than two slots."""
    return [0, 1, 7, 4096, 20001, 2 * SLOT_BYTES // dtype.itemsize + 13]


def values_of_rank(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + size)
    if dtype.is_floating_point:
        return torch.randn(size, generator=generator).to(dtype)
    return torch.randint(-(2**20), 2**20, (size,), generator=generator, dtype=dtype)


def summed(terms: list[Tensor]) -> Tensor:
    """Add in the order of ranks; 16-bit floats in float32, rounded once."""
    dtype = terms[0].dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = terms[0].to(wide)
    for term in terms[1:]:
        total = total + term.to(wide)
    return total.to(dtype)


@distributed(TWO, THREE, FOUR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact(mesh: Mesh, dtype: torch.dtype) -> None:
    """All-reduce and reduce-scatter equal the formula to the bit, at every size."""
    ranks, me, group = mesh.tp.size, mesh.tp.rank, mesh.tp.group
    assert is_shared(group)
    for size in sizes(dtype):
        terms = [values_of_rank(rank, size, dtype) for rank in range(ranks)]
        reduced = terms[me].clone()
        dist.all_reduce(reduced, group=group)
        assert_close(reduced, summed(terms), rtol=0, atol=0)

        wholes = [values_of_rank(rank, ranks * size, dtype) for rank in range(ranks)]
        piece = wholes[me].new_empty(size)
        reduce_scatter_single(piece, wholes[me], group=group)
        expected = summed(wholes).view(ranks, size)[me]
        assert_close(piece, expected, rtol=0, atol=0)
        in_place = wholes[me].view(ranks, size)
        reduce_scatter_single(in_place[me], in_place, group=group)
        assert_close(in_place[me], expected, rtol=0, atol=0)


@distributed(TWO, THREE, FOUR)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.bool], ids=str)
def test_all_gather_is_exact(mesh: Mesh, dtype: torch.dtype) -> None:
    """Even if a rank's input is a view of the output."""
    ranks, me, group = mesh.tp.size, mesh.tp.rank, mesh.tp.group
    for size in sizes(dtype):
        parts = [values_of_rank(rank, size, torch.int32).to(dtype) for rank in range(ranks)]
        gathered = parts[me].new_empty(ranks, size)
        all_gather_single(gathered, parts[me], group=group)
        assert torch.equal(gathered, torch.stack(parts))
        in_place = torch.zeros_like(gathered)
        in_place[me] = parts[me]
        all_gather_single(in_place.view(-1), in_place[me], group=group)
        assert torch.equal(in_place, torch.stack(parts))


@distributed(TWO, FOUR)
def test_results_equal_those_of_gloo(mesh: Mesh) -> None:
    """Up to rounding for shared memory, and exactly for what gloo does itself."""
    theirs, ours = dist.new_group(backend="gloo"), mesh.world.group
    assert not is_shared(theirs)
    assert is_shared(ours)
    x = values_of_rank(mesh.world.rank, 600, torch.float32)
    for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        results = [x.clone(), x.clone()]
        for result, group in zip(results, (ours, theirs), strict=True):
            dist.all_reduce(result, operation, group=group)
        assert_close(*results)
    result = torch.full((3,), mesh.world.rank)
    dist.broadcast(result, 1, group=ours)
    assert result.tolist() == [1, 1, 1]
    dist.barrier(group=ours)
    dist.destroy_process_group(theirs)


@distributed(TWO)
def test_async_work_is_complete(mesh: Mesh) -> None:
    """FSDP2 starts collectives and waits for them later."""
    x = torch.ones(5)
    work = dist.all_reduce(x, group=mesh.tp.group, async_op=True)
    assert work is not None
    assert work.is_completed()
    assert work.wait()
    assert work.get_future().wait()[0] is x
    assert (x == mesh.tp.size).all()


@distributed(TWO)
def test_gloo_collectives_do_not_deadlock(mesh: Mesh) -> None:
    """Many consecutive collectives, which gloo's threads finish while Python runs."""
    for number in range(300):
        assert gather_json(mesh, [number, mesh.world.rank])[1] == [number, 1]


@distributed(TWO)
def test_different_calls_are_an_error(mesh: Mesh) -> None:
    """Every rank raises, and so does every later collective of the group."""
    group = dist.new_group(backend=cpu_backend(True))
    x = torch.ones(4 + mesh.world.rank)
    with pytest.raises(RuntimeError, match="calls all_reduce of 20 bytes"):
        dist.all_reduce(x, group=group)
    with pytest.raises(RuntimeError, match="an earlier collective has failed"):
        dist.all_reduce(torch.ones(4), group=group)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        all_gather_single(torch.empty(3), torch.ones(1), group=mesh.world.group)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        dist.all_reduce(torch.ones(4, 4).t()[1:], group=mesh.world.group)


@distributed(TWO)
def test_timeout(mesh: Mesh) -> None:
    """A missing rank is an error after the timeout of the group, as with gloo."""
    group = dist.new_group(backend=cpu_backend(True), timeout=timedelta(seconds=0.5))
    dist.barrier(group=mesh.world.group)
    if mesh.world.rank == 0:
        with pytest.raises(RuntimeError, match=r"no answer from ranks \[1\] in 0.5 s"):
            dist.all_reduce(torch.ones(1), group=group)
    dist.barrier(group=mesh.world.group)


@distributed(Layout(tp=2, dp=2, shared_memory=True))
def test_messages_name_global_ranks(mesh: Mesh) -> None:
    """Errors of the group of ranks 2 and 3 do not call them 0 and 1."""
    pairs = [dist.new_group([first, first + 1], backend=cpu_backend(True)) for first in (0, 2)]
    me = mesh.world.rank
    other = me + 1 if me % 2 == 0 else me - 1
    with pytest.raises(RuntimeError, match=f"rank {me} calls .*, and rank {other} calls"):
        dist.all_reduce(torch.ones(4 + me), group=pairs[me // 2])


@distributed(TWO)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("posix_fallocate", "[Errno 28] No space left on device"),
        ("pidfd_open", "module 'os' has no attribute 'pidfd_open'"),
        ("memfd_create", "module 'os' has no attribute 'memfd_create'"),
    ],
)
def test_without_memory_all_ranks_use_gloo(mesh: Mesh, name: str, problem: str, rank: int) -> None:
    """If one rank cannot share memory, all use gloo and warn once, even if nothing is set up."""
    if name == "memfd_create":
        rank = 0  # which alone calls it
    messages: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("microtron")
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    _warn_once.cache_clear()

    def is_full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if mesh.world.rank == rank:
            if name == "posix_fallocate":
                patch.setattr(os, name, is_full)
            else:
                patch.delattr(os, name)
        group = dist.new_group(backend=cpu_backend(True))
        dist.new_group(backend=cpu_backend(True))  # has no second warning
    logger.removeHandler(handler)
    assert group is not None
    assert not is_shared(group)
    if mesh.world.rank == 0:
        said = "ranks use gloo, which is slower, as they cannot share memory: rank"
        assert messages == [f"{said} {rank}: {problem}"]
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [2, 2, 2]
    dist.destroy_process_group(group)


@distributed(TWO)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_two_containers_use_gloo(mesh: Mesh, rank: int) -> None:
    """Pids of another container mean other processes, so no process is opened."""
    with pytest.MonkeyPatch.context() as patch:
        if mesh.world.rank == rank:
            patch.setattr("parallel.transport.backend.machine_id", lambda: "another")
        patch.setattr("parallel.transport.backend.SharedMemory", None)
        group = dist.new_group(backend=cpu_backend(True))
    assert group is not None
    assert not is_shared(group)
    x = torch.ones(3)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [2, 2, 2]
    dist.destroy_process_group(group)


def held() -> tuple[int, int]:
    """Count this process's descriptors and mappings of shared memory."""
    links = [
        os.readlink(entry) if entry.is_symlink() else ""
        for entry in Path("/proc/self/fd").iterdir()
    ]
    return (
        sum("memfd:microtron" in link or "pidfd" in link for link in links),
        Path("/proc/self/maps").read_text().count("memfd:microtron"),
    )


@distributed(TWO)
def test_nothing_is_left_behind(mesh: Mesh) -> None:
    """The memory never has a name in /dev/shm, and it ends with the group."""
    before = held()
    group = dist.new_group(backend=cpu_backend(True))
    dist.all_reduce(torch.ones(3), group=group)
    assert held() > before
    assert not list(Path("/dev/shm").glob("*microtron*"))
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert held() == before


def _lose_last_rank(
    rank: int, ranks: int, rendezvous: str, how: str, answers: "Queue[tuple[float, str]]"
) -> None:
    dist.init_process_group(
        cpu_backend(True), init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    x = torch.ones(1 << 20)
    dist.all_reduce(x)
    if rank == ranks - 1:
        if how == "exit":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        dist.all_reduce(x)
    except RuntimeError as error:
        answers.put((time.monotonic() - began, str(error)))
        answers.close()
        answers.join_thread()
    # The end of this rank must not be what the others notice.
    time.sleep(RAISED_WITHIN_S)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_all_ranks_notice_a_lost_peer(how: str, tmp_path: Path) -> None:
    """Every waiting rank raises at once, before the dead process is reaped."""
    ranks = 3
    context = multiprocessing.get_context("spawn")
    answers: Queue[tuple[float, str]] = context.Queue()
    processes = [
        context.Process(
            target=_lose_last_rank,
            args=(rank, ranks, str(tmp_path / "rendezvous"), how, answers),
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for _ in range(ranks - 1):
            seconds, message = answers.get(timeout=300)
            assert f"rank 2 (process {processes[2].pid}) has ended" in message
            assert seconds < RAISED_WITHIN_S
    finally:
        for process in processes:
            process.kill()
            process.join()
