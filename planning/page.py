"""The page that plan.py prints: a step report beside the published formulas."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from configs import Config
from configs.layout import divisors, listed
from configs.weights import model_weights
from model import flops_per_token, num_parameters
from parallel.transport.traffic import Collective
from planning.cluster import Network, Prediction, Sent, groups_like
from planning.dry_run import AFTER, BEFORE, SavedTensors, StepReport
from training.optimizer import muon_flops

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_NAME_WIDTH, _CELL_WIDTH = 55, 14
_SMALL_FRACTION = 0.005  # smaller saved tensors share a row
_MIN_BYTES = 1024  # smaller kinds of memory, such as a loss, have no row
_KINDS = {
    "weights": "weights",
    "moments": "optimizer state",
    "gradients": "gradients, summed and sharded",
    "unsharded gradients": "gradients, unsharded, until the last micro-batch",
    "weight copies": "weights to compute with, cast or gathered",
    "saved activations": "activations saved for backward",
    "messages": "activations and gradients from and to other stages",
    "temporary": "temporary: loss, activation gradients, buffers",
}
_RECOMPUTATION = ("none", "selective", "full")
_LOW_FRACTION = 0.7  # memory in use; below this, suggest using more
_PHASES = {BEFORE: "before the first micro-batch", AFTER: "during the optimizer step"}


class Formula(NamedTuple):
    """Bytes of one layer's activations, at 2 bytes per number: Korthikanti et al. 2022, table 2."""

    text: str
    num_bytes: float
    scores_text: str  # what s x s attention scores add unless they are recomputed
    scores_bytes: float


def paper_formula(config: Config, sequence_parallel: bool) -> Formula:
    """Choose the row of table 2 for a configuration."""
    model, t = config.model, config.parallel.tensor_model_parallel_size
    h, a, s = model.hidden_size, model.num_attention_heads, model.seq_length
    c = config.parallel.context_parallel_size
    sbh = s * config.train.micro_batch_size * h / c
    of_c = " / c" if c > 1 else ""
    if config.parallel.recompute_granularity == "full":
        return Formula(f"full recomputation: 2 sbh{of_c}", 2 * sbh, "", 0)
    if t == 1:
        text, factor = f"{'context' if c > 1 else 'no'} parallelism: 34 sbh", 34.0
    elif sequence_parallel:
        text, factor = "tensor and sequence parallelism: 34 sbh / t", 34 / t
    else:
        text, factor = "tensor parallelism: (10 + 24/t) sbh", 10 + 24 / t
    scores = "5 a s^2 b" if t == 1 else "5 a s^2 b / t"
    return Formula(text + of_c, factor * sbh, scores + of_c, 5 * a * s / (h * t) * sbh)


def page(
    config: Config,
    report: StepReport,
    memory_gib: float,
    stages: Sequence[StepReport] = (),
    hosts: Sequence[str] = (),
) -> str:
    """Format the page; it ends with whether the step fits, and which settings to change.

    `stages`: the reports of all stages of a pipeline, of which `report` is the one that needs most.
    `hosts`: see `hosts_section`.
    """
    sections = (
        _heading(config, report),
        *([_stages(config, report, stages)] if len(stages) > 1 else []),
        _memory(config, report),
        _peak(report),
        _saved(config, report),
        _communication(report),
        *([hosts] if hosts else []),
        _operations(config, report),
        _answer(config, report, memory_gib),
    )
    return "\n".join("\n".join(section) + "\n" for section in sections)


def _heading(config: Config, report: StepReport) -> Iterator[str]:
    model, train, parallel = config.model, config.train, config.parallel
    t, c, p = len(report.tp), len(report.cp), len(report.pp)
    n = t * len(report.dp_cp) * p
    sequence = " + sequence parallel" if report.sequence_parallel else ""
    vocab_size = config.data.padded_vocab_size
    yield (
        f"{config.run.name}: {num_parameters(model, vocab_size):,} parameters on "
        f"{n} rank{'s' * (n > 1)}: tensor parallel {t}{sequence} x data parallel {n // (t * c * p)}"
    )
    if c > 1:
        yield f"  x context parallel {c}, {parallel.cp_comm_type}"
    if (replicas := len(report.replicas)) > 1:
        yield f"  as {replicas} replicas, each sharded over {len(report.shard)} ranks (HSDP)"
    if p > 1:
        v = parallel.virtual_pipeline_model_parallel_size or 1
        yield f"  x pipeline parallel {p}, {v} chunk{'s' * (v > 1)} of layers per stage"
    yield (
        f"s {model.seq_length}, b {train.micro_batch_size}, h {model.hidden_size}, "
        f"a {model.num_attention_heads}, f {model.ffn_size}, L {model.num_layers}, "
        f"v {vocab_size}; {train.precision}"
    )
    yield (
        f"recompute_granularity {parallel.recompute_granularity}, gradient_sync "
        f"{parallel.gradient_sync}, {report.num_micro_batches:,} micro-batches per rank and step"
    )


def _stages(config: Config, report: StepReport, stages: Sequence[StepReport]) -> Iterator[str]:
    v = config.parallel.virtual_pipeline_model_parallel_size or 1
    p, m = len(stages), report.num_micro_batches
    yield _row("Stages of the pipeline", "parameters", "micro-batches", "peak memory")
    for stage in stages:
        name = f"  stage {stage.stage}, layers {_ranges(stage.layers)}"
        # In one of v chunks of layers, a micro-batch counts as 1/v.
        alive = f"{stage.max_alive / v:g} alive"
        yield _row(name, f"{stage.num_parameters:,}", alive, size(stage.peak_bytes))
    if not config.model.untie_embeddings_and_output_weights:
        yield "  The first and the last stage both hold the embedding, which is also the head."
    chunks = " v" if v > 1 else ""
    yield (
        f"Bubble: a stage is idle for (p - 1) / (m{chunks} + p - 1) = "
        f"{(p - 1) / (m * v + p - 1):.1%} of a step of {m:,} micro-batches."
    )
    yield f"The rest of this page is about stage {report.stage}, which needs the most memory."


def _ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers as ranges: 0-2, 6-8."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    ranges = zip(starts, ends, strict=True)
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in ranges)


def _memory(config: Config, report: StepReport) -> Iterator[str]:
    layers, state = len(report.layers), report.state
    rows = [
        (f"{_KINDS[kind].partition(',')[0]}, fp32", state[kind].of_layer, state[kind].total)
        for kind in ("weights", "gradients", "moments")
    ]
    of_layer = sum(saved.num_bytes for saved in report.saved_in_layer)
    rows.append(("activations saved for backward, per micro-batch", of_layer, report.saved_bytes))
    yield _row("Memory per rank", "one layer", f"{layers} layers", "total")
    for name, layer_bytes, total in rows:
        yield _row(f"  {name}", size(layer_bytes), size(layers * layer_bytes), size(total))


def _peak(report: StepReport) -> Iterator[str]:
    yield f"Peak memory ({_PHASES.get(report.peak_phase, f'during {report.peak_phase}')})"
    for kind, num_bytes in report.peak.items():
        if num_bytes >= _MIN_BYTES:
            yield _row(f"  {_KINDS[kind]}", "", "", size(num_bytes))
    yield _row("  total", "", "", size(report.peak_bytes))


def _saved(config: Config, report: StepReport) -> Iterator[str]:
    model, saved = config.model, report.saved_in_layer
    sbh = model.seq_length * config.train.micro_batch_size * model.hidden_size
    yield _row("Tensors that one layer saves for backward, by module", "", "", "/ sbh")
    yield from _saved_rows(saved, "the block", sbh)
    yield _saved_row("  total", sum(tensors.num_bytes for tensors in saved), sbh)
    paper = paper_formula(config, report.sequence_parallel)
    yield _saved_row(f"  paper, {paper.text}", paper.num_bytes, sbh)
    if paper.scores_bytes:
        total = paper.num_bytes + paper.scores_bytes
        yield _saved_row(f"  paper, with s x s scores: + {paper.scores_text}", total, sbh)
    yield "  Paper: Korthikanti et al. 2022, table 2; 2 bytes per number, dropout masks are saved."
    yield "Tensors that the rest of the model saves"
    yield from _saved_rows(report.saved_elsewhere, "the model", sbh)


def _saved_rows(saved: list[SavedTensors], root: str, sbh: int) -> Iterator[str]:
    least = _SMALL_FRACTION * sum(tensors.num_bytes for tensors in saved)
    for tensors in saved:
        if tensors.num_bytes >= least:
            times = f"{tensors.number} x " if tensors.number > 1 else ""
            text = f"{times}{_dtype(tensors.dtype)} {list(tensors.shape)}"
            yield _saved_row(f"  {tensors.module or root:<20}{text}", tensors.num_bytes, sbh)
    if small := sum(tensors.num_bytes for tensors in saved if tensors.num_bytes < least):
        yield _saved_row("  smaller ones", small, sbh)


def _saved_row(name: str, num_bytes: float, sbh: int) -> str:
    return _row(name, "", size(num_bytes), f"{num_bytes / sbh:.2f}")


def _communication(report: StepReport) -> Iterator[str]:
    yield _row("Communication", "count", "full tensor M", "sent per rank")
    for part, collectives in report.traffic.items():
        title = f"  {part}"
        for one, count in collectives.items():
            if one.kind == "recv":
                continue
            kind = f"{one.kind.replace('_', '-')} {_dtype(one.dtype)}"
            sent = size(count * one.sent_bytes)
            yield _row(f"{title:<34}{kind}", f"{count:,}", size(one.full_bytes), sent)
            title = ""
    if not report.step:
        yield "  none: there is one rank"
        return
    yield f"One step, {report.num_micro_batches:,} micro-batches per rank"
    axes, by_axis = _axes(report), dict[str, Counter[Collective]]()
    for one, count in report.step.items():
        by_axis.setdefault(axes.get(one.ranks, "all ranks"), Counter())[one] = count
    for axis, collectives in sorted(by_axis.items(), reverse=True):
        sent = size(sum(one.sent_bytes * count for one, count in collectives.items()))
        yield _row(f"  over {axis}", f"{collectives.total():,}", "", sent)


def _axes(report: StepReport) -> dict[tuple[int, ...], str]:
    """Name the axes of this rank's groups."""
    fsdp = "dp" if len(report.cp) == 1 else "dp x cp"
    axes = {report.tp: f"tp {len(report.tp)}", report.cp: f"cp {len(report.cp)}"}
    axes |= {report.replicas: f"replicas {len(report.replicas)}"}
    axes |= {report.shard: f"{fsdp} {len(report.shard)}", report.pp: f"pp {len(report.pp)}"}
    axes[report.pp[0], report.pp[-1]] = axes[report.pp]  # the sum of a tied table's gradients
    return axes


def hosts_section(
    stages: Sequence[StepReport], network: Network, prediction: Prediction
) -> Iterator[str]:
    """Format the traffic of a step within and between hosts, its time, and what to change."""
    n = network.ranks_per_host
    title = f"Hosts of {n} rank{'s' * (n > 1)}, in one step: the busiest host sends"
    yield _row(title, "within", "to others", "network s")
    by_axis: dict[str, Sent] = {}
    for ranks, sent in prediction.by_ranks.items():
        name = next((a[ranks] for a in map(_axes, stages) if ranks in a), "all ranks")
        by_axis[name] = max(by_axis.get(name, Sent()), sent, key=lambda s: (s.between, s.within))
    for name, sent in sorted(by_axis.items(), reverse=True):
        seconds = "" if network.gbit is None else f"{sent.seconds:.3f}"
        yield _row(f"  over {name}", size(sent.within), size(sent.between), seconds)
    if prediction.step_s is not None and prediction.local_s is not None:
        extra_s = prediction.step_s - prediction.local_s
        total = f"{prediction.local_s:.3f} s + {extra_s:.3f} s = {prediction.step_s:.3f} s"
        yield f"Step time with the network: {total}."
        yield "  Assumes that only a pipeline's messages overlap with computation; GPUs hide more."
    first = stages[0]
    for name, key in (("tp", "tensor_model"), ("cp", "context")):
        groups = [group for one in stages for group in groups_like(getattr(one, name), one)]
        if any(network.crosses(*group) for group in groups):
            setting = f"parallel.{key}_parallel_size={len(groups[0])}"
            yield f"Warning: {setting} crosses hosts; {name} communicates in each layer."
            sizes = listed(divisors(n), " or ")
            yield f"  Choose {sizes}; between hosts use pipeline or data parallelism."
    per_stage = len(first.dp_cp) * len(first.tp)
    fits = n % (len(first.tp) * len(first.cp)) == per_stage % n == 0
    if network.crosses(*first.shard) and fits:
        setting = f"parallel.data_parallel_replicate_size={per_stage // n}"
        yield f"With {setting} weights are gathered within hosts only."
        yield "  Each host then holds all weights and optimizer state."


def _operations(config: Config, report: StepReport) -> Iterator[str]:
    model = config.model
    per_token = flops_per_token(model, config.data.padded_vocab_size)
    attention = 12 * model.num_layers * model.attention_size * model.seq_length
    product = "12 L h s" if model.attention_size == model.hidden_size else "12 L a d s"
    weights = (per_token - attention) // 6
    tokens = config.train.global_batch_size * model.seq_length
    num_ranks = len(report.tp) * len(report.dp_cp) * len(report.pp)
    specs = model_weights(model, config.data.padded_vocab_size).values()
    of_muon = sum(muon_flops(spec, config.optimizer) for spec in specs)
    yield "Floating-point operations, forward and backward"
    yield f"  per token: {per_token:.4g} = 6 x {weights:,} (weights of matrices) + {product}"
    yield f"  per step:  {per_token * tokens:.4g} = that x {tokens:,} tokens"
    if of_muon:
        share = of_muon / (per_token * tokens)
        yield f"  Muon:      {of_muon:.4g} per step, {share:.2g} of that; a matrix is on one rank"
    yield f"  MFU = tokens/s x {per_token:.4g} / ({num_ranks} x peak FLOP/s of a device)"
    yield f"  The causal mask does not halve {product}, and recomputation is not counted."


def _answer(config: Config, report: StepReport, memory_gib: float) -> Iterator[str]:
    spare = memory_gib * 2**30 - report.peak_bytes
    yield "Only tensors are counted. The device's context, buffers of its communication library,"
    yield "kernel workspaces and allocator fragmentation add to this."
    if config.model.attention_dropout:
        yield "Attention dropout is counted as on a CPU, where it saves s x s tensors."
    if config.train.compile and config.model.has_chains:
        yield "train.compile is not counted; with it RMSNorm and SwiGLU save less."
    verdict = (
        f"fits in {memory_gib:g} GiB, {size(spare)} to spare"
        if spare >= 0
        else f"does not fit in {memory_gib:g} GiB, {size(-spare)} too much"
    )
    of_stage = f" of stage {report.stage}" if len(report.pp) > 1 else ""
    yield f"A rank{of_stage} needs {size(report.peak_bytes)} for its tensors: {verdict}."
    yield from _advice(config, report, report.peak_bytes / (memory_gib * 2**30))


def _advice(config: Config, report: StepReport, used: float) -> Iterator[str]:
    """The settings to change, most effective first, if memory is missing or much of it is left."""
    parallel, b, m = config.parallel, config.train.micro_batch_size, report.num_micro_batches
    level, several = _RECOMPUTATION.index(parallel.recompute_granularity), len(report.dp_cp) > 1
    can_reshard = several and len(report.pp) == 1
    num_ranks = len(report.tp) * len(report.dp_cp) * len(report.pp)
    smaller = max((rows for rows in range(1, b) if b % rows == 0), default=None)
    larger = next((b * factor for factor in range(2, m + 1) if m % factor == 0), None)
    if used > 1:
        yield "To use less memory:"
        changes = {
            f"train.micro_batch_size={smaller}": smaller is not None,
            "parallel.recompute_granularity=selective": level == 0,
            "parallel.recompute_granularity=full": level == 1,
            "parallel.reshard_after_forward=true": can_reshard
            and not parallel.reshard_after_forward,
            "parallel.gradient_sync=micro_batch": several and parallel.gradient_sync == "step",
            "more ranks, or a larger parallel.tensor_model_parallel_size": True,
        }
    elif used < _LOW_FRACTION:
        yield f"Only {100 * used:.2g}% of the memory is used. To use more of it, for speed:"
        changes = {
            f"train.micro_batch_size={larger}": larger is not None,
            f"parallel.recompute_granularity={_RECOMPUTATION[level - 1]}": level > 0,
            "parallel.gradient_sync=step": several and parallel.gradient_sync == "micro_batch",
            "parallel.reshard_after_forward=false": can_reshard and parallel.reshard_after_forward,
            "fewer ranks, or a larger model": num_ranks > 1,
            "a larger model": num_ranks == 1,
        }
    else:
        return
    yield from (f"  {change}" for change, applies in changes.items() if applies)


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _row(name: str, *cells: str) -> str:
    """Format a name and right-aligned cells."""
    texts = [f"{cell:>{_CELL_WIDTH}}" for cell in cells]
    return f"{name:<{_NAME_WIDTH}}{''.join(texts)}".rstrip()


def size(num_bytes: float) -> str:
    """Format bytes with a unit and at least three digits."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            digits = 2 if num_bytes < 10 * scale else 1
            return f"{num_bytes / scale:,.{digits}f} {unit}"
    return f"{num_bytes:.0f} B  "
