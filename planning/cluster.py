"""What a step sends between hosts, and how long it takes on a given network.

[Note: network time]
Consecutive ranks share a host. A collective passes around the ring of its ranks (see [Note: bytes
on a ring] in parallel/transport/traffic.py), and what passes from one host to another uses the link
of the host that it leaves. All groups of an axis communicate at the same time and share the links.
A link has a rate in each direction, and each round of a collective waits for the latency once.

The messages of a pipeline travel while its stages compute; a simulation of the schedule finds what
they cost. All other collectives add their whole time: with gloo on CPUs almost nothing overlaps.
GPUs hide FSDP2's collectives and those of `parallel.tp_comm_overlap` in part, so that the predicted
time is an upper bound there.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs import Config
from model import flops_per_token
from parallel.pipeline import schedule
from parallel.transport.traffic import Collective
from planning.dry_run import StepReport

_BACKWARD_TIME = 2  # of a backward, in forwards


@dataclass(frozen=True)
class Network:
    """The links that join hosts."""

    ranks_per_host: int
    gbit: float | None = None  # rate of a host's link in each direction, in Gbit/s
    latency_us: float = 0.0

    def crosses(self, *ranks: int) -> bool:
        """Whether the ranks are on several hosts."""
        return len({rank // self.ranks_per_host for rank in ranks}) > 1

    def seconds(self, num_bytes: float, rounds: int = 1) -> float:
        """Return the time of a transfer over a host's link; 0 without bytes or a known rate."""
        if not num_bytes or self.gbit is None:
            return 0.0
        return num_bytes * 8 / (self.gbit * 1e9) + rounds * self.latency_us * 1e-6


@dataclass(frozen=True)
class Sent:
    """What the ranks of a host send, on the host that sends most, and the time on its link."""

    within: float = 0.0  # bytes to ranks of the same host
    between: float = 0.0  # bytes to other hosts
    seconds: float = 0.0

    def plus(self, other: "Sent", count: int = 1) -> "Sent":
        """Add what another collective sends, `count` times."""
        return Sent(
            self.within + count * other.within,
            self.between + count * other.between,
            self.seconds + count * other.seconds,
        )


def groups_like(ranks: Sequence[int], report: StepReport) -> Iterator[tuple[int, ...]]:
    """Yield `ranks`, one group of an axis, and the other groups of the axis in the same stage."""
    seen: set[int] = set()
    for shift in range(len(report.tp) * len(report.dp_cp)):
        if ranks[0] + shift not in seen:
            group = tuple(rank + shift for rank in ranks)
            seen |= {*group}
            yield group


def sent(one: Collective, report: StepReport, network: Network) -> Sent:
    """Return what a collective sends on all groups of its axis together, along their rings."""
    if _is_message(one, report):  # `predict` adds these
        return Sent()
    rings = groups_like(one.ranks, report)
    edges = [edge for ring in rings for edge in zip(ring, (*ring[1:], ring[0]), strict=True)]
    return _over_links(edges, one.sent_bytes, network, _num_rounds(one))


def _is_message(one: Collective, report: StepReport) -> bool:
    """Whether it passes between stages; others pass between context-parallel ranks."""
    return one.kind in ("send", "recv") and one.ranks == report.pp


def _num_rounds(one: Collective) -> int:
    num_passes = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1}
    return num_passes[one.kind] * (len(one.ranks) - 1) if one.kind in num_passes else 1


def _over_links(
    edges: Sequence[tuple[int, ...]], num_bytes: float, network: Network, rounds: int = 1
) -> Sent:
    """Return what edges from rank to rank send that carry so many bytes each."""
    most = [0, 0]
    for crosses in (False, True):
        hosts = [a // network.ranks_per_host for a, b in edges if network.crosses(a, b) == crosses]
        most[crosses] = max(Counter(hosts).values(), default=0)
    within, between = (number * num_bytes for number in most)
    return Sent(within, between, network.seconds(between, rounds))


def _hops(report: StepReport, num_chunks: int) -> list[list[tuple[int, ...]]]:
    """Return who sends to whom after each piece of a pipeline, in the forward direction."""
    p = len(report.pp)
    ends = [(report.pp[n % p], report.pp[(n + 1) % p]) for n in range(p * num_chunks - 1)]
    return [list(groups_like(pair, report)) for pair in ends]


@dataclass(frozen=True)
class Prediction:
    """The traffic and the time of a step."""

    by_ranks: dict[tuple[int, ...], Sent]  # by the ranks of one group of an axis
    local_s: float | None  # of a step without a network between the hosts
    step_s: float | None


def predict(
    config: Config,
    reports: Sequence[StepReport],
    network: Network,
    local_step_s: float | None = None,
    tflops: float | None = None,
) -> Prediction:
    """Predict a step from the reports of its stages.

    Its computation is given as the time of a step without network, or as the rate of a rank. The
    times are None without either, or without the rate of the network.
    """
    by_ranks: dict[tuple[int, ...], Sent] = {}
    exposed_s = 0.0
    for report in reports:
        of_stage: dict[tuple[int, ...], Sent] = {}
        for one, count in report.step.items():
            before = of_stage.get(one.ranks, Sent())
            of_stage[one.ranks] = before.plus(sent(one, report, network), count)
        exposed_s = max(exposed_s, sum(total.seconds for total in of_stage.values()))
        by_ranks |= of_stage
    first, num_chunks = reports[0], config.parallel.virtual_pipeline_model_parallel_size or 1
    sizes = [one.full_bytes for one in first.step if _is_message(one, first)]
    size, hops = max(sizes, default=0), _hops(first, num_chunks)
    backs = [[edge[::-1] for edge in hop] for hop in hops]
    if hops:
        messages = _over_links(list(itertools.chain(*hops, *backs)), size, network)
        by_ranks[first.pp] = by_ranks[first.pp].plus(messages, first.num_micro_batches)
    if network.gbit is None or (local_step_s is None and tflops is None):
        return Prediction(by_ranks, None, None)

    forwards_s = [_forward_seconds(config, report, tflops or 1.0) for report in reports]
    m = first.num_micro_batches
    local_s = _pipeline_seconds(m, forwards_s, [(0.0, 0.0)] * len(hops))
    if local_step_s is not None:
        forwards_s = [seconds * local_step_s / local_s for seconds in forwards_s]
        local_s = local_step_s
    messages_s = [
        (_over_links(hop, size, network).seconds, _over_links(back, size, network).seconds)
        for hop, back in zip(hops, backs, strict=True)
    ]
    return Prediction(by_ranks, local_s, _pipeline_seconds(m, forwards_s, messages_s) + exposed_s)


def _forward_seconds(config: Config, report: StepReport, tflops: float) -> float:
    """Return the time of one micro-batch's forward through a chunk of layers of a stage."""
    model, vocab_size = config.model, config.data.padded_vocab_size
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    one, two = (
        flops_per_token(dataclasses.replace(model, num_layers=n), vocab_size) for n in (1, 2)
    )
    flops = len(report.layers) * (two - one)
    if report.stage == len(report.pp) - 1:
        flops += 2 * one - two  # the head
    tokens = config.train.micro_batch_size * model.seq_length
    num_ranks = len(report.tp) * len(report.cp)
    return flops * tokens / (1 + _BACKWARD_TIME) / num_chunks / num_ranks / (tflops * 1e12)


def _pipeline_seconds(
    num_micro_batches: int, forwards_s: Sequence[float], messages_s: Sequence[tuple[float, float]]
) -> float:
    """Simulate a step: the forwards of each stage, the messages after each piece of the model."""
    p, last = len(forwards_s), len(messages_s)
    waiting = [deque(one) for one in schedule(num_micro_batches, p, (last + 1) // p)]
    # When the input of (is_forward, micro-batch, piece) is there.
    arrived = {(True, n, 0): 0.0 for n in range(num_micro_batches)}
    clocks, links_free = [0.0] * p, defaultdict[tuple[int, bool], float](float)
    while any(waiting):
        for stage, actions in enumerate(waiting):
            while actions:
                is_forward, n, chunk = actions[0]
                piece = chunk * p + stage
                if (begin := arrived.get((is_forward, n, piece))) is None:
                    break
                actions.popleft()
                factor = 1 if is_forward else _BACKWARD_TIME
                clocks[stage] = max(clocks[stage], begin) + factor * forwards_s[stage]
                following = piece + 1 if is_forward else piece - 1
                if following > last:
                    arrived[False, n, last] = clocks[stage]
                elif following >= 0:
                    message_s = messages_s[min(piece, following)][0 if is_forward else 1]
                    link = stage, is_forward
                    links_free[link] = max(links_free[link], clocks[stage]) + message_s
                    arrived[is_forward, n, following] = links_free[link]
    return max(clocks)
