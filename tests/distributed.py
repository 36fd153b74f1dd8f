"""Tests whose body every rank runs: `@distributed(layout, ...)`.

One pool of worker processes per number of ranks lives for the whole session, because importing
torch takes seconds. A test names the layouts it wants; the body runs on every rank with a `mesh` of
that layout as its first argument. Rendezvous is a file, so no port can be taken. A test that hangs
fails: the stacks of all ranks are shown, and the pool is replaced, as its collectives may be out of
step.

With MICROTRON_TEST_DEVICE=cuda every rank has a GPU of its own and NCCL, and tensors that a test
makes are on it: `make test-gpu`.
"""

import atexit
import contextlib
import faulthandler
import functools
import importlib
import inspect
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ops.matmul import use_full_precision
from ops.sdpa import avoid_cudnn_attention
from parallel.mesh import CPCommType, Mesh, Overlap, make_mesh
from parallel.transport.backend import cpu_backend
from tests.fork_server import begin_to_collect_garbage, fork_server
from training import hardware

DEVICE = os.environ.get("MICROTRON_TEST_DEVICE", "cpu")  # or cuda
TIME_LIMIT_S = 300.0  # compiling on a busy machine takes minutes
_TESTS = str(Path(__file__).parent)
# Starts the workers. mutations.py, whose process has done nothing but imports, sets a plain fork.
start_method: Callable[[], Any] = fork_server


@dataclass(frozen=True)
class Layout:
    """A grid of ranks to run a test on."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    chunks: int = 1  # of each stage
    cp: int = 1
    replicas: int = 1  # of the shards, over dp
    sp: bool = True
    overlap: Overlap = "none"
    cp_comm_type: CPCommType = "all_gather"
    shared_memory: bool = False  # between the ranks; otherwise gloo

    @property
    def num_ranks(self) -> int:
        """Ranks of all axes."""
        return self.tp * self.cp * self.dp * self.pp

    def has_devices(self) -> bool:
        """Whether the test device has a place for each rank."""
        if DEVICE == "cpu":
            return True
        return self.num_ranks <= torch.cuda.device_count() and not self.shared_memory

    def __str__(self) -> str:
        sp = "+sp" if self.sp and self.tp > 1 else ""
        overlap = f"-overlap {self.overlap}" if self.overlap != "none" else ""
        memory = "-memory" if self.shared_memory else ""
        cp = f"-cp{self.cp} {self.cp_comm_type}" if self.cp > 1 else ""
        chunks = f"x{self.chunks}" if self.chunks > 1 else ""
        pp = f"-pp{self.pp}{chunks}" if self.pp > 1 else ""
        replicas = f"/{self.replicas}" if self.replicas > 1 else ""
        return f"tp{self.tp}{sp}-dp{self.dp}{replicas}{cp}{pp}{overlap}{memory}"


ONE_RANK = Layout()
TENSOR_PARALLEL = (Layout(tp=2), Layout(tp=2, sp=False), Layout(tp=4), Layout(tp=4, sp=False))
OVERLAPPED = (
    Layout(overlap="backward"),
    Layout(tp=2, overlap="backward"),
    Layout(tp=2, sp=False, overlap="backward"),
    Layout(tp=4, overlap="backward"),
)
EVERY_LAYOUT = (ONE_RANK, *TENSOR_PARALLEL, Layout(dp=2), Layout(tp=2, dp=2))


def distributed(*layouts: Layout) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the decorated body on every rank of each layout; other parameters pass through."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        def test(layout: Layout, **parameters: Any) -> None:
            run_on(layout, body, **parameters)

        functools.update_wrapper(test, body)
        test.body = body  # type: ignore[attr-defined]
        # pytest gives what the signature asks for: the body's own parameters, and a layout for
        # mesh.
        signature = inspect.signature(body)
        named = ["layout", *(name for name in signature.parameters if name != "mesh")]
        test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in named]
        )
        return pytest.mark.parametrize("layout", layouts, ids=str)(test)

    return decorate


def run_on(layout: Layout, body: Callable[..., None], **parameters: Any) -> None:
    """Run a module's function on every rank of a layout, a mesh first; any rank's failure fails."""
    if not layout.has_devices():
        pytest.skip(f"{layout} needs {layout.num_ranks} GPUs")
    pool = _pool(layout.num_ranks, layout.shared_memory)
    pool.run(body.__module__, body.__qualname__, layout, parameters)


class OnDevice(TorchFunctionMode):
    """Makes the tensors that tests create on a device; what our own code creates is unchanged.

    Draws from a generator are made on the CPU and copied, so that they are the same everywhere.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        of_test = sys._getframe(1).f_code.co_filename.startswith(_TESTS)
        if not of_test or func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            return func(*args, **kwargs).to(self.device)
        return func(*args, **{**kwargs, "device": self.device})


class _Pool:
    """`world_size` worker processes that share a process group and run one body at a time."""

    def __init__(self, world_size: int, shared_memory: bool) -> None:
        self.key = (world_size, shared_memory)
        self.directory = tempfile.TemporaryDirectory()
        context = start_method()
        self.workers, self.pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_work, args=(rank, *self.key, self.directory.name, theirs), daemon=True
            )
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(ours)

    def run(self, *job: Any) -> None:
        for pipe in self.pipes:
            pipe.send(job)
        deadline = time.monotonic() + TIME_LIMIT_S
        waiting, failures = dict(zip(self.pipes, range(len(self.pipes)), strict=True)), {}
        while waiting and (remaining := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), remaining):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failure = pipe.recv()
                except EOFError:
                    failure = "the worker process died"
                if failure:
                    failures[rank] = failure
                    # Its peers may now wait for it for ever.
                    deadline = min(deadline, time.monotonic() + 2.0)
        failures |= {rank: self.stack(rank) for rank in waiting.values()}
        if failures:
            self.close()
            pytest.fail(_report(failures), pytrace=False)

    def stack(self, rank: int) -> str:
        os.kill(self.workers[rank].pid, signal.SIGQUIT)
        time.sleep(0.3)
        dump = Path(self.directory.name, f"stack{rank}").read_text()
        return f"no answer in time\n{dump}"

    def close(self) -> None:
        _POOLS.pop(self.key, None)
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.directory.cleanup()


_POOLS: dict[tuple[int, bool], _Pool] = {}


def _pool(*key: Any) -> _Pool:
    if key not in _POOLS:
        _POOLS[key] = _Pool(*key)
    return _POOLS[key]


@atexit.register
def close_pools() -> None:
    """End all workers; later tests start new ones."""
    for pool in list(_POOLS.values()):
        pool.close()


def _report(failures: dict[int, str]) -> str:
    lines = [f"rank {rank}: {text.strip().splitlines()[-1]}" for rank, text in failures.items()]
    # A peer that failed only because another did says so by its connection.
    first = next(
        (text for text in failures.values() if "onnection" not in text and "no answer" not in text),
        next(iter(failures.values())),
    )
    return "\n".join([*lines, "", first])


def _work(
    rank: int, world_size: int, shared_memory: bool, directory: str, pipe: Connection
) -> None:
    begin_to_collect_garbage()
    # Open for life: the handler writes to it.
    stack_file = Path(directory, f"stack{rank}").open("w")  # noqa: SIM115
    faulthandler.register(signal.SIGQUIT, file=stack_file, all_threads=True)
    torch.set_num_threads(1)
    hardware._seconds_of_product = lambda _: 1.0  # the peak rate; native bf16 takes a minute
    # Warns that full_tensor, which tests alone call, gathers over two axes one after the other.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    device = torch.device("cpu") if DEVICE == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        use_full_precision()
        avoid_cudnn_attention()
        torch.cuda.set_device(device)
    dist.init_process_group(
        cpu_backend(shared_memory) if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        device_id=None if device.type == "cpu" else device,
    )
    meshes: dict[Layout, Mesh] = {}
    while True:
        try:
            module, name, layout, parameters = pipe.recv()
        except EOFError:
            return
        try:
            if layout not in meshes:
                meshes[layout] = make_mesh(
                    layout.tp,
                    layout.sp,
                    device,
                    rank,
                    overlap=layout.overlap,
                    pipeline_model_parallel_size=layout.pp,
                    num_chunks=layout.chunks,
                    context_parallel_size=layout.cp,
                    data_parallel_replicate_size=layout.replicas,
                    cp_comm_type=layout.cp_comm_type,
                )
            function = getattr(importlib.import_module(module), name)
            with contextlib.nullcontext() if device.type == "cpu" else OnDevice(device):
                # The name of a decorated test is that of its wrapper.
                getattr(function, "body", function)(meshes[layout], **parameters)
            pipe.send(None)
        except Exception:
            pipe.send(traceback.format_exc())
