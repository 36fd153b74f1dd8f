"""Two hosts on one machine, joined by a slow link: how much communication overlap hides.

    python -m bench.network [--mbit 1000 4000] [--warmup 1 --steps 2] [section.key=value ...]

Needs Linux, root and iproute2. Each host is a network namespace with one rank on its own core; a
veth pair joins them, with a token bucket (tc tbf) at both ends. Runs our trainer only, on bench-gpt
in bf16 over gloo. The settings take turns at each rate. `hidden` is the fraction of the link's cost
without overlap, relative to a link without a limit, that overlap removes.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.timing import find_report
from bench.workload import Workload

_HOSTS = ("microtron-a", "microtron-b")
_ENDS = ("mt-a", "mt-b")
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_UNLIMITED = 0
_LEAST_COST = 0.05  # of a step; fractions of smaller costs are noise
# What is compared on a layout; the first is without overlap.
_SETTINGS = {
    "tp2+sp": [f"parallel.tp_comm_overlap={value}" for value in ("none", "backward")],
}


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """The namespaces and the link between them, without a limit yet."""
    made = []
    try:
        for host in _HOSTS:
            _do("ip", "netns", "add", host)
            made.append(host)
        _do("ip", "link", "add", _ENDS[0], "type", "veth", "peer", "name", _ENDS[1])
        for host, end, address in zip(_HOSTS, _ENDS, _ADDRESSES, strict=True):
            _do("ip", "link", "set", end, "netns", host)
            _do("ip", "-n", host, "addr", "add", f"{address}/24", "dev", end)
            _do("ip", "-n", host, "link", "set", end, "up")
            _do("ip", "-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in made:  # the link goes with them
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def limit(mbit: int) -> None:
    """Limit the rate in each direction; 0: no limit."""
    for host, end in zip(_HOSTS, _ENDS, strict=True):
        tc = ["ip", "netns", "exec", host, "tc", "qdisc"]
        subprocess.run([*tc, "del", "dev", end, "root"], check=False, capture_output=True)
        if mbit != _UNLIMITED:
            bucket = ["tbf", "rate", f"{mbit}mbit", "burst", "512kb", "latency", "50ms"]
            _do(*tc, "add", "dev", end, "root", *bucket)


def visit(workload: Workload, overrides: Sequence[str], steps: Sequence[str]) -> dict[str, Any]:
    """Run two ranks, one in each host; return the report of rank 0."""
    processes = []
    for number, (host, end) in enumerate(zip(_HOSTS, _ENDS, strict=True)):
        command = [
            *("ip", "netns", "exec", host, "env", f"GLOO_SOCKET_IFNAME={end}"),
            *("taskset", "-c", str(number), sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)),
            *("--master-addr", _ADDRESSES[0], "--master-port", "29511", "-m", "bench.ours"),
            *workload.flags(),
            *steps,
            # Only their networks are separate; they would find that they can share memory.
            "parallel.shared_memory=false",
            *overrides,
        ]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    report = find_report(outputs[0])
    if report is None:
        sys.exit(f"no result from {workload} {' '.join(overrides)}:\n{outputs[0][-4000:]}")
    return report


def measure(arguments: argparse.Namespace) -> Iterator[str]:
    """A line of a table for each layout, setting and rate."""
    yield "| layout | setting | link, Mbit/s | s a step | hidden | losses as without overlap |"
    yield "|---|---|---|---|---|---|"
    steps = [f"--warmup={arguments.warmup}", f"--steps={arguments.steps}"]
    for layout, settings in _SETTINGS.items():
        for mbit in (_UNLIMITED, *arguments.mbit):
            limit(mbit)
            reports = {
                setting: visit(Workload(layout), [setting, *arguments.overrides], steps)
                for setting in settings
            }
            plain = reports[settings[0]]
            plain_s = statistics.median(plain["step_s"])
            if mbit == _UNLIMITED:
                free_s = plain_s
            costs = plain_s - free_s
            for setting, report in reports.items():
                step_s = statistics.median(report["step_s"])
                can_tell = report is not plain and costs > _LEAST_COST * plain_s
                hidden = f"{(plain_s - step_s) / costs:.2f}" if can_tell else ""
                alike = "yes" if report["losses"] == plain["losses"] else "no"
                name = setting.partition(".")[2]
                yield f"| {layout} | {name} | {mbit or 'any'} | {step_s:.2f} | {hidden} | {alike} |"


def main() -> int:
    """The table, line by line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=int, nargs="*", default=[4000, 1000], help="rates")
    parser.add_argument("--warmup", type=int, default=1, help="steps of a visit before timing")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a visit")
    parser.add_argument("overrides", nargs="*", help="settings of ours for all")
    arguments = parser.parse_args()
    with two_hosts():
        for line in measure(arguments):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
