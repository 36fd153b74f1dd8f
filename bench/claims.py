"""Claims about the results: ratios, and the bounds that they must keep.

A bound is set before it is measured. A ratio is of medians, and the best peer is the fastest one
measured in the same run.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.pool import Results
from bench.sides import GRANULARITIES, MEGATRON, SIDES
from bench.workload import Workload

PEERS = tuple(side.key for side in SIDES if side.key != "ours")


@dataclass(frozen=True)
class Claim:
    """One figure against its bound."""

    what: str
    bound: float
    value: float | None  # None: a figure that it needs was not measured
    at_least: bool = True  # else at most
    beside: str = ""  # the best peer

    @property
    def verdict(self) -> str:
        """One word for a table."""
        if self.value is None:
            return "not measured"
        kept = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "passed" if kept else "missed"


def claims(results: Results) -> Iterator[Claim]:
    """Return all claims, measured or not."""
    against_peers = (
        ("TP=1, bf16: ours over the best peer", "tp1", "tp1", "bf16", 1.15),
        ("TP=2 + SP, bf16: ours over the best peer with SP", "tp2+sp", "tp2+sp", "bf16", 1.6),
        ("TP=2 + SP, bf16: ours over the best peer without SP", "tp2+sp", "tp2", "bf16", 1.35),
        ("DP=2, bf16: ours over the best peer", "dp2", "dp2", "bf16", 1.15),
        ("TP=1, fp32: ours over the best peer", "tp1", "tp1", "fp32", 1.0),
        ("TP=2 + SP, fp32: ours over the best peer with SP", "tp2+sp", "tp2+sp", "fp32", 1.3),
    )
    for what, our_layout, peer_layout, precision, bound in against_peers:
        ours = tokens_per_second(results, "speed", "ours", Workload(our_layout, precision))
        peer, best = best_peer(results, Workload(peer_layout, precision))
        yield Claim(what, bound, ratio(ours, best), beside=peer)
    with_sp = tokens_per_second(results, "speed", "ours", Workload("tp2+sp"))
    without = tokens_per_second(results, "speed", "ours", Workload("tp2"))
    yield Claim("ours, bf16: TP=2 with SP over without", 1.05, ratio(with_sp, without))
    for layout, name in (("tp1", "TP=1"), ("tp2+sp", "TP=2 + SP")):
        yield from _of_layout(results, layout, name)
    ours_mb, megatron_mb = (
        speed.peak_mb if speed else None
        for speed in (
            results.speed("speed", key, Workload("tp2+sp")) for key in ("ours", MEGATRON.key)
        )
    )
    what = "TP=2 + SP, bf16: peak memory of a rank, ours over megatron-core"
    yield Claim(what, 0.65, ratio(ours_mb, megatron_mb), at_least=False)
    overhead = results.found("overhead", "overhead", Workload())
    step = results.speed("speed", "ours", Workload())
    share = None
    if overhead and step:
        share = max(record["batch_s"] + record["log_s"] for record in overhead) / step.median_s
    what = "making batches and logging, share of a step, TP=1, bf16"
    yield Claim(what, 0.01, share, at_least=False)


def _of_layout(results: Results, layout: str, name: str) -> Iterator[Claim]:
    """Claims about dropout, and about saved activations."""
    plain = tokens_per_second(results, "speed", "ours", Workload(layout))
    dropping = tokens_per_second(results, "dropout", "ours", Workload(layout, dropout=0.1))
    what = f"ours, {name}, bf16: hidden dropout 0.1 over 0, speed"
    yield Claim(what, 0.9, ratio(dropping, plain))
    most = {
        "none": {"tp1": 32.0, "tp2+sp": 16.0},
        "selective": {"tp1": 20.5, "tp2+sp": 10.3},
        "full": {"tp1": 2.1, "tp2+sp": 1.1},
    }
    for granularity, of_layout in most.items():
        if granularity not in GRANULARITIES:
            continue
        override = [f"parallel.recompute_granularity={granularity}"]
        shape = Workload(layout, dropout=0.1)
        kept = results.found("activations", "ours", shape, override)
        value = kept[-1]["bytes_per_sbh"] if kept else None
        what = f"ours, {name}, recompute {granularity}: bytes kept per layer / sbh"
        yield Claim(what, of_layout[layout], value, at_least=False)
    if "selective" in GRANULARITIES:
        override = ["parallel.recompute_granularity=selective"]
        slower = tokens_per_second(results, "recompute", "ours", Workload(layout), override)
        what = f"ours, {name}, bf16: step time of recompute selective over none"
        yield Claim(what, 1.03, ratio(plain, slower), at_least=False)


def tokens_per_second(
    results: Results, kind: str, side: str, shape: Workload, overrides: list[str] | None = None
) -> float | None:
    """Of the median step; None if it was not measured."""
    speed = results.speed(kind, side, shape, overrides or [])
    return speed.tokens_per_second if speed else None


def best_peer(results: Results, shape: Workload) -> tuple[str, float | None]:
    """The fastest of the measured peers, and its tokens per second."""
    measured = {key: tokens_per_second(results, "speed", key, shape) for key in PEERS}
    speeds = {key: speed for key, speed in measured.items() if speed is not None}
    if not speeds:
        return "", None
    best = max(speeds, key=lambda key: speeds[key])
    return best, speeds[best]


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b; None if either is."""
    return None if a is None or b is None else a / b
