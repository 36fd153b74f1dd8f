"""A pipeline of two stages: its bubble, and a slow link to the other stage.

    python -m bench.pipeline bubble [--micro_batches 2 4 8 16] [--rounds 2 --steps 2]
    python -m bench.pipeline network [--mbit 1000 4000] [--rows 8] [--rounds 2 --steps 2]

Eight layers of bench-gpt with rows of 512 tokens and a vocabulary of 1,024, whose output layer
costs little, so that both stages have the same work; our trainer in bf16 on two ranks, one core
each. Settings `section.key=value` at the end apply to every visit. What is compared takes turns,
and medians are over the steps of all rounds.

`bubble` times steps of m micro-batches of one row, also with v=2 chunks of layers per stage. The
time of a micro-batch without a bubble is the slope of the step time between the least and the most
micro-batches. "Idle" compares a step with m times that; a pipeline predicts 1 + (p - 1) / (m v).

`network` times steps on pp=2, tp=2 with sequence parallelism, and dp=2: on one host, and between
two network namespaces (see network.py) whose link has a limited rate. The predictions are those of
`plan.py hosts=2 network_gbit=... local_step_s=...`, given the time on one host.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

from bench.network import limit, two_hosts, visit
from bench.ours import settings
from bench.run import make_visit
from bench.sides import OURS, Visit
from bench.workload import PIPELINE, Workload
from configs import parse_config
from planning.cluster import Network, predict
from planning.dry_run import dry_run

_WORKLOAD = Workload(PIPELINE, seq_length=512, vocab_size=1024, micro_batch_size=1)
_CHUNKS = "parallel.virtual_pipeline_model_parallel_size"
_ONE_HOST = 0  # in place of a rate
_LAYOUTS = {
    "PP=2": (PIPELINE, f"{_CHUNKS}=null"),
    "PP=2, v=2": (PIPELINE, f"{_CHUNKS}=2"),
    "TP=2 + SP": ("tp2+sp",),
    "DP=2": ("dp2",),
}
_LIMIT_S = 600.0  # of a visit
_LARGEST_SHARE = 0.05  # of the cores, taken by others


class Times:
    """The step times of all visits to each case."""

    def __init__(self) -> None:
        self._of: dict[tuple[str | int, int], list[float]] = {}
        self._foreign: list[float] = []

    def add(self, case: tuple[str | int, int], report: dict[str, list[float]]) -> None:
        """Add the steps of a visit."""
        if "step_s" not in report:
            sys.exit(f"no result for {case}: {report['error']}")
        sys.stderr.write(f"{case}: {report['step_s']} s, others {report['foreign']}\n")
        self._of.setdefault(case, []).extend(report["step_s"])
        self._foreign += report["foreign"]

    def __getitem__(self, case: tuple[str | int, int]) -> float:
        return statistics.median(self._of[case])

    def disturbance(self) -> str:
        """Say in how many steps other processes took much of the cores."""
        number = sum(share > _LARGEST_SHARE for share in self._foreign)
        return f"Other jobs disturbed {number} of {len(self._foreign)} steps."


def _steps(arguments: argparse.Namespace) -> list[str]:
    flags = ("warmup", "steps", "patience_s")
    return [f"--{flag}={getattr(arguments, flag)}" for flag in flags]


def bubble(arguments: argparse.Namespace) -> Iterator[str]:
    """A line of a table for each number of chunks and of micro-batches."""
    times, counts, steps = Times(), sorted(arguments.micro_batches), _steps(arguments)
    for _ in range(arguments.rounds):
        for m in counts:
            for v in (1, 2):
                workload = replace(_WORKLOAD, global_batch_size=m)
                overrides = (f"{_CHUNKS}={v}", *arguments.overrides)
                found = make_visit(Visit("speed", OURS, workload, overrides), steps, _LIMIT_S)
                times.add((m, v), found)
    yield "| v | m | s a step | s a micro-batch | idle, measured | 1 + (p - 1) / (m v) |"
    yield "|---|---|---|---|---|---|"
    for v in (1, 2):
        least, most = counts[0], counts[-1]
        slope = (times[most, v] - times[least, v]) / (most - least)
        for m in counts:
            step_s, predicted = times[m, v], 1 + 1 / (m * v)
            idle = step_s / (m * slope)
            cells = f"{step_s:.2f} | {step_s / m:.3f} | {idle:.2f} | {predicted:.2f}"
            yield f"| {v} | {m} | {cells} |"
    yield times.disturbance()


def network(arguments: argparse.Namespace) -> Iterator[str]:
    """A line of a table for each layout and rate."""
    times, steps = Times(), _steps(arguments)
    cases = dict[str, tuple[Workload, tuple[str, ...]]]()
    for name in arguments.layouts:
        layout, *chunks = _LAYOUTS[name]
        rows = 1 if layout == PIPELINE else 0  # 0: all that a rank has
        shape = replace(_WORKLOAD, layout=layout, micro_batch_size=rows)
        shape = replace(shape, global_batch_size=arguments.rows)
        cases[name] = shape, (*chunks, *arguments.overrides)
    with two_hosts():
        for _ in range(arguments.rounds):
            for name, (shape, overrides) in cases.items():
                here = make_visit(Visit("speed", OURS, shape, overrides), steps, _LIMIT_S)
                times.add((name, _ONE_HOST), here)
                for mbit in arguments.mbit:
                    limit(mbit)
                    times.add((name, mbit), visit(shape, overrides, steps))
    yield "| layout | one host, s a step | link, Mbit/s | measured | predicted | error |"
    yield "|---|---|---|---|---|---|"
    for name, (shape, overrides) in cases.items():
        config = parse_config([*settings(shape), *overrides], lambda _: 2)
        stages = [dry_run(config, 2, stage=stage) for stage in range(shape.size("pp"))]
        local_s = times[name, _ONE_HOST]
        for mbit in arguments.mbit:
            network = Network(1, mbit / 1000, arguments.latency_us)
            predicted_s = predict(config, stages, network, local_s).step_s
            assert predicted_s is not None
            step_s = times[name, mbit]
            cells = f"{step_s:.2f} | {predicted_s:.2f} | {predicted_s / step_s - 1:+.0%}"
            yield f"| {name} | {local_s:.2f} | {mbit} | {cells} |"
    yield times.disturbance()


def main() -> int:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("bubble", "network"))
    parser.add_argument("--micro_batches", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--mbit", type=int, nargs="*", default=[1000, 4000], help="link's rates")
    parser.add_argument("--latency_us", type=float, default=50.0, help="of the link, to predict")
    parser.add_argument("--layouts", nargs="*", default=[*_LAYOUTS], choices=_LAYOUTS)
    parser.add_argument("--rows", type=int, default=8, help="of 512 tokens in a step, for network")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=1, help="steps of a visit before timing")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a visit")
    parser.add_argument("--patience_s", type=float, default=10, help="wait so long for other jobs")
    parser.add_argument("overrides", nargs="*", help="settings of ours for all")
    arguments = parser.parse_args()
    for line in {"bubble": bubble, "network": network}[arguments.table](arguments):
        sys.stdout.write(f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
