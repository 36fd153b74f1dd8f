"""torchrun, seen from a process that it launched: its options and its death."""

import contextlib
import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # prctl(2)


def launch_command() -> str:
    """The command that launched this program, up to the program itself.

    Keeps torchrun's options where the system shows the parent's command line (Linux); elsewhere
    only the numbers of nodes and ranks, which the environment has.
    """
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE")
    if ranks_here is None:
        return "python"
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


def stop_when_launcher_dies() -> None:
    """Have the kernel send SIGTERM if torchrun is killed, so that no orphan trains on (Linux)."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before this call
        sys.exit(128 + signal.SIGTERM)
