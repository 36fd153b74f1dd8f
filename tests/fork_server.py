"""Programs of the project as forks of one process that has already imported torch.

A Python process spends seconds on importing torch, for torchrun and for every rank. The fork
server pays for that once per test session. A program behaves as if it had been started from a
shell: its own session, environment, arguments, output pipe and exit code. torchrun is the real
elastic agent, which forks its workers instead of starting an interpreter for each. Only the peak
matmul rate, which MFU is relative to, is not measured; what `tests.runs.launch` starts does.
"""

import contextlib
import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from training import hardware

# Everything that is slow to import, of programs and of pools; torch computes nothing, so that no
# thread exists when it forks.
_PRELOAD = (
    "tests.no_garbage",
    "datasets",
    "sentencepiece",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "train",
    "generate",
    "evaluate",
    "wandb",
    "torch.utils.tensorboard",
    "pytest",
    "tests.trained_runs",
    "tests.fork_server",
    "tests.warm",
)
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # libgomp reads it when torch is imported
# Each rank leaves a file `PID-RANK` in this folder, as /proc shows the server's command line.
REGISTRY = "TEST_RANK_REGISTRY"


class Program:
    """A running program with the part of `subprocess.Popen`'s interface that the tests need."""

    def __init__(self, arguments: Sequence[str], given: bytes = b"", **options: Any) -> None:
        """`arguments`: a program's path and its arguments; `given`: its input (up to 64 KiB).

        See `_run` for the options.
        """
        reader, writer = multiprocessing.Pipe(duplex=False)
        stdin, feed = multiprocessing.Pipe(duplex=False)
        os.write(feed.fileno(), given)
        feed.close()
        self._process = fork_server().Process(
            target=_run, args=(list(arguments), writer, stdin), kwargs=options
        )
        self._process.start()
        writer.close()
        stdin.close()
        self.pid: int = self._process.pid  # type: ignore[assignment]  # it has been started
        self._output = bytearray()
        self._collector = threading.Thread(target=self._collect, args=(reader,), daemon=True)
        self._collector.start()

    def _collect(self, reader: Connection) -> None:
        while chunk := os.read(reader.fileno(), 1 << 16):
            self._output += chunk

    @property
    def returncode(self) -> int | None:
        """The exit code, negative after a signal, or None while the program runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while the program runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the program, not to its children."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until the program and all its children have closed the output; returns it.

        After `timeout` seconds they are killed, or the tests could not end.
        """
        self._collector.join(timeout)
        if self._collector.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired("program", timeout or 0, bytes(self._output))
        self._process.join(timeout)
        return self._output.decode(), None


@functools.cache
def fork_server() -> Any:
    """The context whose processes are forks of the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    # The test that needs it first may have changed the environment, for example PYTHONPATH.
    with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        multiprocessing.forkserver.ensure_running()
    os.environ["OMP_NUM_THREADS"] = "1"
    return context


def begin_to_collect_garbage() -> None:
    """Collect garbage again, but not among what imports have made."""
    gc.freeze()
    gc.enable()


def _run(
    arguments: list[str],
    output: Connection,
    given: Connection,
    *,
    environment: Mapping[str, str],
    torchrun: Sequence[str] | None = None,
    largest_file_kib: int | None = None,
    stderr_file: str | None = None,
) -> None:
    """In the fork: become the program, under torchrun if its flags are given."""
    begin_to_collect_garbage()
    os.setsid()
    os.dup2(output.fileno(), 1)
    errors = output.fileno() if stderr_file is None else os.open(stderr_file, os.O_WRONLY)
    os.dup2(errors, 2)
    output.close()
    os.dup2(given.fileno(), 0)
    given.close()
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir("/")
    hardware._seconds_of_product = lambda _: 1.0
    if largest_file_kib is not None:
        limit = largest_file_kib << 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    multiprocessing.current_process().daemon = False
    if torchrun is None:
        _main(arguments)
    else:
        _launch([*torchrun, *arguments])


def _launch(command: list[str]) -> None:
    """The torchrun command, whose workers are forks of its agent."""
    from torch.distributed import run  # noqa: PLC0415  # only programs under torchrun need it
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous  # noqa: PLC0415

    # It looks for its callers' names in the source of every module, four times per launch.
    dynamic_rendezvous.get_method_name = lambda _=0: "torchrun"
    elastic_launch = run.elastic_launch

    def fork_workers(config: Any, entrypoint: str) -> Callable[..., Any]:
        config.start_method = "fork"
        return lambda unbuffered, *arguments: elastic_launch(config, _worker)(list(arguments))

    run.elastic_launch = fork_workers
    run.main(command)


def _worker(arguments: list[str]) -> None:
    """Run the program once all workers of this host have been forked.

    The store of the agent looks up the name of each worker that connects, which takes a lock. A
    worker that is forked meanwhile gets the lock as it is, and would wait for it forever.
    """
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children")
    deadline = time.monotonic() + 10
    while len(children.read_text().split()) < int(os.environ["LOCAL_WORLD_SIZE"]):
        if time.monotonic() > deadline:  # one has been killed
            break
        time.sleep(0.001)
    _main(arguments)


def _main(arguments: list[str]) -> None:
    """Run a program as `__main__`, after the `sitecustomize` that Python would have run."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if folder and Path(folder, "sitecustomize.py").exists():
            runpy.run_path(str(Path(folder, "sitecustomize.py")))
    if registry := os.environ.get(REGISTRY):
        Path(registry, f"{os.getpid()}-{os.environ.get('RANK', '0')}").touch()
    # multiprocessing has replaced it by /dev/null, here and in torchrun's workers.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for the process's life
    sys.argv[:] = arguments
    with contextlib.suppress(KeyError):
        del sys.modules["__mp_main__"]
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except Exception:
        traceback.print_exc()  # as the interpreter would; torch's workers only report it
        raise
