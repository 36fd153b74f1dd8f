"""What a rank holds and sends in a step, by kind, from a rehearsal of it; and the paper's formulas.

Legend as in model/gpt.py. M is the bytes of a full tensor, see [Note: bytes on a ring] in
parallel/traffic.py.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from configs import Config
from parallel.traffic import Collective
from planning.dry_run import AFTER, BACKWARD, BEFORE, FORWARD, DryRun, Sent, dry_run
from planning.memory_log import Piece

# All micro-batches of a step but the last are alike, so two of them say what any number does.
_REHEARSED = 2
PEAK_KINDS = (
    "weights",
    "moments",
    "gradients",
    "gathered weights",
    "waiting gradients",
    "activations",
    "in work",
)


@dataclass(frozen=True)
class Kept:
    """Tensors of one shape that a module leaves behind for backward."""

    place: str  # the module, without its layer
    dtype: torch.dtype
    shape: tuple[int, ...]
    number: int
    num_bytes: int  # all of them


@dataclass(frozen=True)
class Traffic:
    """What a part of a step sends."""

    axis: str  # tp, dp, or empty for any
    part: str
    collectives: Counter[Collective]

    @property
    def sent_bytes(self) -> float:
        """What this rank sends on a ring."""
        return sum(one.sent_bytes * number for one, number in self.collectives.items())


@dataclass(frozen=True)
class Peak:
    """What there is when a rank holds most."""

    by_kind: dict[str, int]  # bytes
    phase: str

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(self.by_kind.values())


@dataclass(frozen=True)
class Formula:
    """Korthikanti et al. 2022, table 2: activations of a layer in bytes, two for each number."""

    variant: str
    text: str
    num_bytes: float
    text_of_scores: str  # what s x s attention adds, where it is not recomputed
    bytes_of_scores: float


@dataclass(frozen=True)
class Account:
    """All of it, for rank 0: where pieces are uneven, no other has more."""

    rehearsal: DryRun
    kept_in_layer: list[Kept]
    kept_outside: list[Kept]
    kept_in_all: int  # bytes, of a micro-batch
    peak: Peak
    traffic: list[Traffic]  # parts, in the order of a step
    step: Counter[Collective]
    num_micro_batches: int


def account(config: Config, num_ranks: int) -> Account:
    """Rehearse a step and count.

    Raises RuntimeError if this process has joined a group of ranks.
    """
    t, b = config.parallel.tensor_model_parallel_size, config.train.micro_batch_size
    num_micro_batches = config.train.global_batch_size // (b * (num_ranks // t))
    seen = dry_run(config, num_ranks, min(num_micro_batches, _REHEARSED))
    layer = config.model.num_layers // 2  # FSDP2 treats the first and the last one differently
    kept = _kept(seen)
    prefix = f"blocks.{layer}"
    return Account(
        rehearsal=seen,
        kept_in_layer=_by_shape(kept, lambda place: _below(prefix, place)),
        kept_outside=_by_shape(kept, lambda place: place if "blocks." not in place else None),
        kept_in_all=sum(kept.values()),
        peak=_peak(seen),
        traffic=_parts(seen, layer),
        step=_step(seen, num_micro_batches),
        num_micro_batches=num_micro_batches,
    )


def paper_formula(config: Config, sequence_parallel: bool) -> Formula:
    """The row of table 2 that describes the configuration."""
    model, t = config.model, config.parallel.tensor_model_parallel_size
    h, a, s = model.hidden_size, model.num_attention_heads, model.seq_length
    sbh = s * config.train.micro_batch_size * h
    if config.parallel.recompute_granularity == "full":
        return Formula("full recomputation", "2 sbh", 2 * sbh, "", 0)
    if t == 1:
        variant, text, factor = "no parallelism", "34 sbh", 34.0
    elif sequence_parallel:
        variant, text, factor = "tensor and sequence parallelism", "34 sbh / t", 34 / t
    else:
        variant, text, factor = "tensor parallelism", "(10 + 24/t) sbh", 10 + 24 / t
    scores = "5 a s^2 b" if t == 1 else "5 a s^2 b / t"
    return Formula(variant, text, factor * sbh, scores, 5 * a * s / (h * t) * sbh)


def _below(prefix: str, place: str) -> str | None:
    """A place relative to a module; None if it is outside of it."""
    is_inside = f"{place}.".startswith(f"{prefix}.")
    return place[len(prefix) + 1 :] if is_inside else None


def _state(seen: DryRun) -> frozenset[Piece]:
    return seen.weights.pieces | seen.moments.pieces | seen.gradients.pieces


def _kept(seen: DryRun) -> dict[Piece, int]:
    """What the forward of the first micro-batch leaves behind, without what FSDP2 gathers."""
    state, after = _state(seen), seen.memory.live(seen.ends[0, FORWARD])
    return {
        piece: size
        for piece, size in after.items()
        if piece not in state and not piece.was_emptied and piece.taken_at >= seen.started_at
    }


def _by_shape(kept: dict[Piece, int], name: Callable[[str], str | None]) -> list[Kept]:
    """Pieces whose place has a name, those of one name, dtype and shape together."""
    groups: dict[tuple[str, torch.dtype, tuple[int, ...]], list[int]] = {}
    for piece, size in kept.items():
        place = name(piece.place)
        if place is not None:
            groups.setdefault((place, piece.dtype, piece.shape), []).append(size)
    return [Kept(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]


def _peak(seen: DryRun) -> Peak:
    memory = seen.memory
    instant = memory.peak()
    kept = _left_behind(seen, FORWARD)
    waiting = _left_behind(seen, BACKWARD)
    by_kind = dict.fromkeys(PEAK_KINDS, 0)
    for piece, size in memory.live(instant).items():
        if piece in seen.weights.pieces:
            kind = "weights"
        elif piece in seen.moments.pieces:
            kind = "moments"
        elif piece in seen.gradients.pieces:
            kind = "gradients"
        elif piece.was_emptied:
            kind = "gathered weights"
        elif piece in waiting:
            kind = "waiting gradients"
        elif piece in kept:
            kind = "activations"
        else:
            kind = "in work"
        by_kind[kind] += size
    phases = [(end, phase) for (_, phase), end in seen.ends.items() if instant <= end]
    return Peak(by_kind, min(phases)[1] if phases else AFTER)


def _left_behind(seen: DryRun, phase: str) -> set[Piece]:
    """What was taken in this phase of a micro-batch and is there when it ends."""
    before = FORWARD if phase == BACKWARD else BACKWARD
    pieces: set[Piece] = set()
    for number in range(seen.num_rehearsed):
        began = seen.ends.get((number - (phase == FORWARD), before), seen.started_at)
        after = seen.memory.live(seen.ends[number, phase])
        pieces |= {piece for piece in after if piece.taken_at >= began}
    return pieces


def _parts(seen: DryRun, layer: int) -> list[Traffic]:
    """The parts of a step: of a micro-batch over each axis, and what comes once."""

    def part(axis: str, name: str, belongs: Callable[[Sent], bool]) -> Traffic:
        return Traffic(axis, name, Counter(one.collective for one in seen.sent if belongs(one)))

    def of(ranks: tuple[int, ...], phase: str, number: int, sent: Sent) -> bool:
        return (sent.collective.ranks, sent.phase, sent.micro_batch) == (ranks, phase, number)

    def of_layer(phase: str, number: int | None, sent: Sent) -> bool:
        return of(seen.tp, phase, first, sent) and sent.layer == number

    first, last = 0, seen.num_rehearsed - 1
    parts = [
        part("tp", f"{place}, {phase}", partial(of_layer, phase, number))
        for place, number in (("a layer", layer), ("outside of layers", None))
        for phase in (FORWARD, BACKWARD)
    ]
    parts.append(part("dp", "a micro-batch, forward", partial(of, seen.dp, FORWARD, first)))
    backward = part("dp", "a micro-batch, backward", partial(of, seen.dp, BACKWARD, first))
    of_last = part("dp", "the last one, backward", partial(of, seen.dp, BACKWARD, last))
    parts += [backward] if backward.collectives == of_last.collectives else [backward, of_last]
    return [*parts, part("", "once a step", lambda sent: sent.phase in (BEFORE, AFTER))]


def _step(seen: DryRun, num_micro_batches: int) -> Counter[Collective]:
    """Everything that a step of so many micro-batches sends."""
    last, step = seen.num_rehearsed - 1, Counter[Collective]()
    for one in seen.sent:
        is_repeated = one.phase in (FORWARD, BACKWARD) and one.micro_batch < last
        step[one.collective] += num_micro_batches - 1 if is_repeated else 1
    return step
