"""What torchrun tells a process, and ending with one message for all ranks.

torchrun ends all ranks as soon as one has failed, and shows what the first one left in its error
file. So rank 0 speaks and fails, and the others give it time to. They speak only if they outlive
that: then it is their own machine on which something is wrong.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from configs.errors import ConfigError, format_value

EXIT_BEFORE_TRAINING = 2  # the exit code of everything that is found before training
_SPINS = "3000"  # before a waiting thread sleeps; libgomp's default is 300,000
_WAIT_FOR_RANK_ZERO_S = 5.0  # torchrun looks at its processes ten times a second


def limit_thread_spinning() -> None:
    """Let waiting OpenMP threads sleep after a short spin; libgomp reads this when it is loaded.

    By default they spin for milliseconds at each barrier. Where something else runs on the machine,
    that keeps the thread they wait for from its core (measured in docs/performance.md). Users who
    set a policy keep it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def is_rank_zero() -> bool:
    """True for the one process that speaks for all; also without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def world_size_from_environment() -> int:
    """The number of ranks that torchrun has started, 1 without torchrun."""
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
    """What the attempts of one launch have in common, and other launches have not."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()}:{os.getppid()}" if run_id == "none" else run_id


def exit_with_error(
    message: str, code: int = EXIT_BEFORE_TRAINING, *, only_here: bool = False
) -> NoReturn:
    """Prints a message once for all ranks, or what `only_here` was found, and ends this process."""
    if only_here:
        message = f"[rank {os.environ.get('RANK', '0')}] {message}"
    elif not is_rank_zero():
        time.sleep(_WAIT_FOR_RANK_ZERO_S)
    if only_here or is_rank_zero() or os.environ.get("LOCAL_RANK") == "0":
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
    leave_error(message)
    raise SystemExit(code)


def leave_error(message: str) -> None:
    """Leaves the message where torchrun takes its "Root Cause" from, which is else a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
    Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
