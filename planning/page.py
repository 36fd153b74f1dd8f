"""The page that plan.py prints: an account in columns, for a person to read."""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from configs import Config
from model import flops_per_token, num_parameters
from parallel.traffic import Collective
from planning.accounting import Account, Kept, Traffic, paper_formula

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_NAME, _CELL = 55, 14  # widths
_SMALL = 0.005  # of all that a layer keeps: below, shapes share a line
_LEAST = 1024  # bytes of a kind that get a line; a loss is a scalar
_SCORES_DIMS = 3  # scores have heads or sequences besides s x s
_KINDS = {
    "weights": "weights",
    "moments": "AdamW's moments",
    "gradients": "gradients, summed and sharded",
    "waiting gradients": "gradients, whole, waiting for the last micro-batch",
    "gathered weights": "weights that FSDP2 has gathered for now",
    "activations": "activations kept for backward",
    "in work": "in work: the loss, gradients of activations, buffers",
}


def page(config: Config, plan: Account, memory_gib: float) -> str:
    """The whole page, its answer last."""
    sections = (
        _heading(config, plan),
        _memory(config, plan),
        _peak(plan),
        _kept(config, plan),
        _wire(plan),
        _operations(config, plan),
        _answer(config, plan, memory_gib),
    )
    return "\n".join("\n".join(section) + "\n" for section in sections)


def _heading(config: Config, plan: Account) -> Iterator[str]:
    model, train, seen = config.model, config.train, plan.rehearsal
    t, n = len(seen.tp), len(seen.tp) * len(seen.dp)
    how = " + sequence parallel" if seen.sequence_parallel else ""
    yield (
        f"{config.run.name}: {num_parameters(model, config.data.vocab_size):,} parameters on "
        f"{n} rank{'s' * (n > 1)}: tensor parallel {t}{how} x data parallel {len(seen.dp)}"
    )
    yield (
        f"s {model.seq_length}, b {train.micro_batch_size}, h {model.hidden_size}, "
        f"a {model.num_attention_heads}, f {model.ffn_size}, L {model.num_layers}, "
        f"v {config.data.vocab_size}; {train.precision}"
    )
    yield (
        f"recompute_granularity {config.parallel.recompute_granularity}, "
        f"gradient_sync {config.parallel.gradient_sync}, {plan.num_micro_batches:,} micro-batches "
        "of a rank in a step"
    )


def _memory(config: Config, plan: Account) -> Iterator[str]:
    layers, seen = config.model.num_layers, plan.rehearsal
    yield _row("Memory of a rank", "a layer", f"{layers} layers", "all")
    for name, held in (
        ("weights, fp32", seen.weights),
        ("gradients, fp32", seen.gradients),
        ("AdamW's two moments, fp32", seen.moments),
    ):
        yield _row(
            f"  {name}", size(held.of_layer), size(layers * held.of_layer), size(held.of_rank)
        )
    of_layer = sum(kept.num_bytes for kept in plan.kept_in_layer)
    yield _row(
        "  activations kept for backward, of a micro-batch",
        size(of_layer),
        size(layers * of_layer),
        size(plan.kept_in_all),
    )


def _peak(plan: Account) -> Iterator[str]:
    moment = {"after": "the update of the weights"}.get(plan.peak.phase, plan.peak.phase)
    yield f"When a rank holds most, in {moment}"
    for kind, num_bytes in plan.peak.by_kind.items():
        if num_bytes >= _LEAST:
            yield _row(f"  {_KINDS[kind]}", "", "", size(num_bytes))
    yield _row("  all", "", "", size(plan.peak.num_bytes))


def _kept(config: Config, plan: Account) -> Iterator[str]:
    model = config.model
    s, sbh = model.seq_length, model.seq_length * config.train.micro_batch_size * model.hidden_size
    yield _row("What a layer keeps for backward, and who makes it", "", "", "/ sbh")
    yield from _kept_rows(plan.kept_in_layer, "the block", sbh)
    yield _kept_row("  all", sum(kept.num_bytes for kept in plan.kept_in_layer), sbh)
    paper = paper_formula(config, plan.rehearsal.sequence_parallel)
    yield _kept_row(f"  paper, {paper.variant}: {paper.text}", paper.num_bytes, sbh)
    if paper.bytes_of_scores:
        whole = paper.num_bytes + paper.bytes_of_scores
        yield _kept_row(f"  paper, with scores of s x s: + {paper.text_of_scores}", whole, sbh)
    scores = sum(
        kept.num_bytes
        for kept in plan.kept_in_layer
        if len(kept.shape) >= _SCORES_DIMS and kept.shape[-2:] == (s, s)
    )
    if scores:
        yield _kept_row("  of ours, scores of s x s", scores, sbh)
    else:
        yield "  ours keeps no scores of s x s: attention works them out again in backward"
    yield "  paper: Korthikanti et al. 2022, table 2, for two bytes a number and dropout masks kept"
    yield "What the rest of the model keeps"
    yield from _kept_rows(plan.kept_outside, "the model", sbh)


def _kept_rows(kept: list[Kept], whole: str, sbh: int) -> Iterator[str]:
    least = _SMALL * sum(one.num_bytes for one in kept)
    for one in kept:
        if one.num_bytes >= least:
            times = f"{one.number} x " if one.number > 1 else ""
            name = f"  {one.place or whole:<20}{times}{_dtype(one.dtype)} {list(one.shape)}"
            yield _kept_row(name, one.num_bytes, sbh)
    small = sum(one.num_bytes for one in kept if one.num_bytes < least)
    if small:
        yield _kept_row("  smaller ones", small, sbh)


def _kept_row(name: str, num_bytes: float, sbh: int) -> str:
    return _row(name, "", size(num_bytes), f"{num_bytes / sbh:.2f}")


def _wire(plan: Account) -> Iterator[str]:
    seen = plan.rehearsal
    yield _row("On the wire", "number", "full tensor M", "a rank sends")
    for part in plan.traffic:
        yield from _part(part)
    if not plan.step:
        yield "  nothing: there is one rank"
        return
    yield f"A step, {plan.num_micro_batches:,} micro-batches of a rank"
    of_axis: dict[str, Counter[Collective]] = {}
    for one, number in plan.step.items():
        axis = {seen.tp: f"tp {len(seen.tp)}", seen.dp: f"dp {len(seen.dp)}"}
        of_axis.setdefault(axis.get(one.ranks, "all ranks"), Counter())[one] += number
    for axis_name, collectives in sorted(of_axis.items(), reverse=True):
        whole = Traffic("", "", collectives)
        yield _row(f"  over {axis_name}", f"{collectives.total():,}", "", size(whole.sent_bytes))


def _part(part: Traffic) -> Iterator[str]:
    title = f"  {part.axis or 'any':<4}{part.part}"
    for one, number in part.collectives.items():
        kind = f"{one.kind.replace('_', '-')} {_dtype(one.dtype)}"
        sent = size(number * one.sent_bytes)
        yield _row(f"{title:<34}{kind}", f"{number:,}", size(one.full_bytes), sent)
        title = ""


def _operations(config: Config, plan: Account) -> Iterator[str]:
    model = config.model
    per_token = flops_per_token(model, config.data.vocab_size)
    attention = 12 * model.num_layers * model.hidden_size * model.seq_length
    tokens = config.train.global_batch_size * model.seq_length
    num_ranks = len(plan.rehearsal.tp) * len(plan.rehearsal.dp)
    yield "Operations, forward and backward"
    yield (
        f"  a token: {per_token:.4g} = 6 x {(per_token - attention) // 6:,} (weights of matrices) "
        "+ 12 L h s"
    )
    yield f"  a step:  {per_token * tokens:.4g} = that x {tokens:,} tokens"
    yield f"  MFU = tokens/s x {per_token:.4g} / ({num_ranks} x peak operations/s of a device)"
    yield "  The causal mask does not halve 12 L h s, and recomputation does not count."


def _answer(config: Config, plan: Account, memory_gib: float) -> Iterator[str]:
    spare = memory_gib * 2**30 - plan.peak.num_bytes
    yield "Counted are tensors. The device's own context, buffers of its communication library,"
    yield "workspace of kernels and what an allocator cannot use come on top."
    if config.model.attention_dropout:
        yield "Attention with dropout is counted as on a processor, where it keeps s x s tensors."
    if config.train.compile and config.model.has_chains:
        yield "Counted without train.compile, with which RMSNorm and SwiGLU keep less."
    verdict = (
        f"fits in {memory_gib:g} GiB, {size(spare)} to spare"
        if spare >= 0
        else f"does not fit in {memory_gib:g} GiB, {size(-spare)} too much"
    )
    yield f"A rank needs {size(plan.peak.num_bytes)} for its tensors: {verdict}."


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _row(name: str, *cells: str) -> str:
    """A name, and cells in columns to its right."""
    texts: Iterable[str] = (f"{cell:>{_CELL}}" for cell in cells)
    return f"{name:<{_NAME}}{''.join(texts)}".rstrip()


def size(num_bytes: float) -> str:
    """Bytes with a unit, three digits at least."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            digits = 2 if num_bytes < 10 * scale else 1
            return f"{num_bytes / scale:,.{digits}f} {unit}"
    return f"{num_bytes:.0f} B  "
