"""The environment of a launch, and exits with one message for all ranks.

torchrun stops all ranks as soon as one has failed, and shows the first error file written. So rank
0 prints and fails, while the others wait. A rank that survives the wait prints its own error.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import NoReturn

from configs.errors import ConfigError, format_value

EXIT_BEFORE_TRAINING = 2  # exit code of every error before training
_SPINS = "3000"  # before a waiting thread sleeps; libgomp's default is 300,000
_WAIT_FOR_RANK_ZERO_S = 5.0  # torchrun polls its processes ten times per second
_FIRST_PORT, _NUM_PORTS = 20000, 10000  # for the store of a Slurm step; below the ephemeral ones
_PR_SET_PDEATHSIG = 1  # prctl(2)
# Poll for up to a minute; torchrun kills ranks that need longer than 30 s.
_PRINT_AFTER = """
for _ in $(seq 600); do
    kill -0 "$1" 2>/dev/null || { printf '%s\\n' "$2" >&2; exit; }
    sleep 0.1
done
"""


def set_up_environment() -> None:
    """Let Slurm's tasks be ranks, and OpenMP threads sleep; call this before importing torch.

    By default waiting threads spin for milliseconds at each barrier, which takes cores from other
    processes (measured in docs/results.md). A policy set by the user stays. The end of the process
    collects no garbage: Python would visit all objects of torch's modules, which takes seconds.
    """
    atexit.register(gc.freeze)
    use_slurm_tasks(os.environ)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def use_slurm_tasks(environ: MutableMapping[str, str]) -> None:
    """Describe the tasks of `srun python train.py` as torchrun describes its ranks."""
    if "RANK" in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return
    environ["RANK"], environ["LOCAL_RANK"] = environ["SLURM_PROCID"], environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_WORLD_SIZE"] = str(len(environ["SLURM_GTIDS"].split(",")))
    environ.setdefault("MASTER_ADDR", first_node(environ["SLURM_STEP_NODELIST"]))
    step = int(environ["SLURM_JOB_ID"]) + 1000 * int(environ["SLURM_STEP_ID"])
    environ.setdefault("MASTER_PORT", str(_FIRST_PORT + step % _NUM_PORTS))


def first_node(nodes: str) -> str:
    """The first name of a Slurm node list: rack[2-4]n[007-009,12],login gives rack2n007."""
    first = re.match(r"(\[[^]]*]|[^,[])*", nodes)
    return re.sub(r"\[(\d+)[^]]*]", r"\1", first[0] if first else nodes)


def threads_per_rank(num_threads: int | None, environ: Mapping[str, str]) -> int:
    """Return the number of CPU threads of this rank.

    In this order: `num_threads` (train.num_threads), SLURM_CPUS_PER_TASK / local ranks,
    OMP_NUM_THREADS (unless it is 1 under torchrun, which sets that itself), cores / local ranks.
    """
    if num_threads is not None:
        return num_threads
    slurm, omp = (environ.get(name, "") for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"))
    under_torchrun = "TORCHELASTIC_RUN_ID" in environ
    if slurm.isdecimal() and "SLURM_STEP_NUM_TASKS" in environ and not under_torchrun:
        return max(1, int(slurm))  # each rank is a task
    if slurm.isdecimal():
        cores = int(slurm)
    elif omp.isdecimal() and not (omp == "1" and under_torchrun):
        return max(1, int(omp))
    else:
        cores = usable_cores()
    return max(1, cores // int(environ.get("LOCAL_WORLD_SIZE", "1")))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def is_rank_zero() -> bool:
    """Return whether this process prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def world_size_from_environment() -> int:
    """Return the number of ranks of the launch."""
    if "RANK" not in os.environ:
        return 1
    text = os.environ.get("WORLD_SIZE", "")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the environment has RANK but WORLD_SIZE={format_value(text)}; start with torchrun, "
            "or unset RANK"
        )
    return int(text)


def launch_id() -> str:
    """Return an identifier that the restarts of one launch share."""
    if "SLURM_JOB_ID" in os.environ:
        return f"Slurm job {os.environ['SLURM_JOB_ID']}"
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}:{os.getppid()}" if run_id == "none" else run_id


def num_restarts() -> int:
    """How often torchrun has restarted the ranks, or Slurm has requeued the job."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return sum(int(os.environ.get(name, "0")) for name in counts)


def exit_with_error(
    message: str,
    code: int = EXIT_BEFORE_TRAINING,
    *,
    only_here: bool = False,
    may_be_alone: bool = False,
) -> NoReturn:
    """Print a message once for all ranks (or for `only_here`, with the rank) and exit.

    A rank that `may_be_alone` with its error prints it too, if it still runs after the wait.
    """
    if not only_here and not is_rank_zero():
        time.sleep(_WAIT_FOR_RANK_ZERO_S)
    if only_here or (may_be_alone and not is_rank_zero()):
        message = f"[rank {os.environ.get('RANK', '0')}] {message}"
    if only_here or may_be_alone or is_rank_zero() or os.environ.get("LOCAL_RANK") == "0":
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    leave_error(message)
    raise SystemExit(code)


def leave_error(message: str) -> None:
    """Write the message where torchrun looks for the "Root Cause", in place of a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def launch_command() -> str:
    """The command that launched this program, up to the program itself.

    Keeps torchrun's options where the system shows the parent's command line (Linux); elsewhere
    only the numbers of nodes and ranks, which the environment has.
    """
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_here is None:
        return "python"
    if "SLURM_STEP_NUM_TASKS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        keys = {
            "nodes": "STEP_NUM_NODES",
            "ntasks": "STEP_NUM_TASKS",
            "cpus-per-task": "CPUS_PER_TASK",
        }
        values = {option: os.environ.get(f"SLURM_{key}") for option, key in keys.items()}
        return " ".join(["srun", *(f"--{k}={v}" for k, v in values.items() if v), "python"])
    with contextlib.suppress(OSError):
        command = os.fsdecode(Path(f"/proc/{os.getppid()}/cmdline").read_bytes())
        options = torchrun_options(command.split("\0")[:-1], sys.argv)
        if options is not None:
            return shlex.join(["torchrun", *options])
    nodes = int(os.environ["WORLD_SIZE"]) // int(ranks_here)
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {ranks_here}"


def torchrun_options(command: list[str], program: list[str]) -> list[str] | None:
    """torchrun's own options in the command line that launched `program`; None if it is another."""
    size = len(command) - len(program)
    for number, argument in enumerate(command[:size]):
        if argument.endswith(("torchrun", "torch.distributed.run")) and command[size:] == program:
            return command[number + 1 : size]
    return None


def print_after_launcher(text: str) -> None:
    """Print to the terminal once torchrun has ended, below the traceback that a signal causes.

    torchrun waits for its workers before it prints that, so a detached shell does the printing.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.stderr.isatty():
        command = ["sh", "-c", _PRINT_AFTER, "sh", str(os.getppid()), text]
        with contextlib.suppress(OSError):  # it is only a convenience
            subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def stop_when_launcher_dies() -> None:
    """Have the kernel send SIGTERM if torchrun is killed, so that no orphan trains on (Linux)."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before this call
        sys.exit(128 + signal.SIGTERM)
