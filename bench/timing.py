"""Times the steps of a side, and detects those that other jobs on the machine have disturbed.

[Note: undisturbed steps]
On a shared or virtual machine a step may get less than its cores. /proc/stat gives the seconds that
all cores were busy; less those of our own ranks, they belong to other jobs. Seconds that a
hypervisor took away are counted there too. A step in which either exceeds 5% of the cores is
disturbed. Before each timed step the ranks wait, up to a limit, for other jobs to stop.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench.workload import Arguments

LARGEST_SHARE = 0.05  # of the cores, taken by others in an undisturbed step
_LOOK_S = 0.25
_MARK = "RESULT "
_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STOLEN = 0, 1, 2, 5, 6, 7  # proc(5), /proc/stat


def time_steps(step: Callable[[int], float], arguments: Arguments) -> dict[str, Any]:
    """Runs warm-up and timed steps; `step` does a whole one, given its number, returns its loss.

    Returns the seconds of each timed step, the shares of the cores that others took, the mean over
    ranks of the losses of all steps, and the largest resident memory of any rank.
    """
    patience_s = arguments.patience_s
    losses, elapsed, foreign, stolen = [], [], [], []
    for number in range(arguments.warmup + arguments.steps):
        if number >= arguments.warmup:
            patience_s = _wait_for_others(patience_s)
        busy, taken = _cpu_seconds()
        own_s, started_at = time.process_time(), time.perf_counter()
        losses.append(step(number))
        elapsed_s = time.perf_counter() - started_at
        own_s = time.process_time() - own_s
        busy_after, taken_after = _cpu_seconds()
        capacity_s = elapsed_s * (os.cpu_count() or 1)
        if number >= arguments.warmup:
            elapsed.append(elapsed_s)
            foreign.append(max(0.0, busy_after - busy - _over_ranks(own_s, "sum")) / capacity_s)
            stolen.append((taken_after - taken) / capacity_s)
    num_ranks = _over_ranks(1.0, "sum")
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "step_s": elapsed,
        "foreign": foreign,
        "stolen": stolen,
        "losses": [_over_ranks(loss, "sum") / num_ranks for loss in losses],
        "peak_mb": _over_ranks(peak_kib / 1024, "max"),
    }


def report(result: dict[str, Any]) -> None:
    """Rank 0 writes a result to stdout, as a line that `find_report` knows."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stdout.write(f"{_MARK}{json.dumps(result)}\n")
        sys.stdout.flush()


def report_speed(
    step: Callable[[int], float],
    arguments: Arguments,
    num_parameters: int,
    flops_per_token: int | None = None,
) -> None:
    """Times a peer's steps, reports, leaves; operations are the workload's if not given."""
    shape = arguments.workload
    report(
        {
            "num_parameters": num_parameters,
            "flops_per_token": flops_per_token or shape.flops_per_token(),
            "tokens_per_step": shape.tokens_per_step,
            **time_steps(step, arguments),
        }
    )
    leave()


def find_report(output: str) -> dict[str, Any] | None:
    """Find the result in the output of a side; None if there is none."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            return dict(json.loads(line.removeprefix(_MARK)))
    return None


def leave() -> None:
    """Leaves the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _cpu_seconds() -> tuple[float, float]:
    """Seconds that all cores were busy, and that the hypervisor took, since the machine started."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:]]
    per_s = os.sysconf("SC_CLK_TCK")
    busy = sum(ticks[kind] for kind in (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ))
    return busy / per_s, ticks[_STOLEN] / per_s


def _wait_for_others(patience_s: float) -> float:
    """Waits until others leave the cores alone, at most so long; returns what is left of it."""
    started_at = time.perf_counter()
    if not dist.is_initialized() or dist.get_rank() == 0:
        while time.perf_counter() - started_at < patience_s:
            busy, _ = _cpu_seconds()
            time.sleep(_LOOK_S)
            if _cpu_seconds()[0] - busy <= LARGEST_SHARE * _LOOK_S * (os.cpu_count() or 1):
                break
    if dist.is_initialized():
        dist.barrier()
    return max(0.0, patience_s - (time.perf_counter() - started_at))


def _over_ranks(value: float, how: str) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return total.item()
