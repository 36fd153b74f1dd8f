"""The tables of docs/benchmarks.md, generated from raw results."""

from collections.abc import Callable, Iterator
from pathlib import Path

from bench.claims import claims
from bench.pool import Records, Results, Speed
from bench.sides import GRANULARITIES, MEGATRON, OURS, PLAIN, SIDES, scaling_shapes
from bench.workload import LAYOUTS, Workload

_LAYOUT_NAMES = {"tp1": "TP=1", "tp2": "TP=2", "tp2+sp": "TP=2 + SP", "dp2": "DP=2"}


def write_page(page: Path | None, records: Records) -> str:
    """Puts the tables that there are results for between their marks; returns them as text.

    Without a page they are only returned. Tables of other kinds of visits stay as they are.
    """
    results = Results(records)
    text, told = ("" if page is None else page.read_text("utf-8")), []
    for name, (kinds, lines) in TABLES.items():
        if kinds & results.kinds():
            table = "\n".join([machine_line(records), "", *lines(results)])
            told.append(table)
            text = text if page is None else between_marks(text, name, table)
    if page is not None:
        page.write_text(text, "utf-8")
    return "\n\n".join(told)


def between_marks(text: str, name: str, table: str) -> str:
    """The page's text with a table in place of what stands between its two comments.

    Raises ValueError if the page has no such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"the page has no place for a table between {begin!r} and {end!r}")
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def machine_line(records: Records) -> str:
    """Where and when it was measured."""
    machines = [record for record in records if record["kind"] == "machine"]
    rounds = {record["round"] for record in records if record["kind"] != "machine"}
    dates = dict.fromkeys(machine["date"] for machine in machines)
    last = machines[-1]
    return (
        f"{last['cores']} cores of {last['processor']}, {last['instructions']}, "
        f"{last['memory_gib']} GiB; torch {last['torch']}, gloo; rounds: {len(rounds)}; "
        f"{' and '.join(dates)}."
    )


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*names), "|---" * len(names) + "|"]


def figures(speed: Speed) -> list[str]:
    """Tokens per second, spread, undisturbed of timed steps, seconds of a step."""
    mark = "~" if speed.is_disturbed else ""
    undisturbed = 0 if speed.is_disturbed else len(speed.step_s)
    slowest, fastest = (speed.tokens_per_step / f(speed.step_s) for f in (max, min))
    return [
        f"{mark}{speed.tokens_per_second:.0f}",
        f"{slowest:.0f} to {fastest:.0f}",
        f"{undisturbed} of {speed.num_steps}",
        f"{speed.median_s:.2f}",
    ]


def speed_table(results: Results) -> Iterator[str]:
    """All sides on all layouts, the fastest first."""
    for precision in ("bf16", "fp32"):
        yield from head(
            f"{precision}, side",
            "layout",
            "tokens/s",
            "slowest to fastest step",
            "undisturbed",
            "s / step",
            "MFU",
            "peak MB / rank",
        )
        for layout in LAYOUTS:
            yield from _speed_rows(results, Workload(layout, precision))
        rates = (results.gemm_flops_per_second(Workload(key, precision)) for key in ("tp1", "tp2"))
        one, two = (f"{rate / 1e9:.0f}" if rate else "-" for rate in rates)
        yield from ("", f"Products alone: {one} GFLOP/s on one process, {two} on two.", "")


def _speed_rows(results: Results, shape: Workload) -> Iterator[str]:
    layout, measured = _LAYOUT_NAMES[shape.layout], []
    for side in SIDES:
        if results.found("speed", side.key, shape) is None:
            continue
        speed = results.speed("speed", side.key, shape)
        if speed is None:
            error = results.error("speed", side.key, shape).replace("|", "/")
            measured.append((0.0, row(side.name, layout, f"not measured: {error}", *[""] * 5)))
            continue
        rate, gemm = speed.tokens_per_second, results.gemm_flops_per_second(shape)
        mfu = f"{100 * rate * speed.flops_per_token / gemm:.0f}%" if gemm else "-"
        name = f"**{side.name}**" if side == OURS else side.name
        cells = row(name, layout, *figures(speed), mfu, f"{speed.peak_mb:.0f}")
        measured.append((rate, cells))
    yield from (cells for _, cells in sorted(measured, reverse=True))


def claims_table(results: Results) -> Iterator[str]:
    """Each claim with its bound, and whether it holds."""
    yield from head("what", "bound", "measured", "")
    for claim in claims(results):
        bound = f"{'at least' if claim.at_least else 'at most'} {claim.bound:g}"
        value = "-" if claim.value is None else f"{claim.value:.3g}"
        beside = f" ({claim.beside})" if claim.beside else ""
        yield row(claim.what, bound, value + beside, claim.verdict)


def dropout_table(results: Results) -> Iterator[str]:
    """Speed with dropout over the speed without, of the sides that were asked."""
    yield from head("side", "layout", "dropout", "tokens/s", "over no dropout")
    for side in (OURS, PLAIN, MEGATRON):
        for layout in LAYOUTS:
            for attention in (0.0, 0.1):
                shape = Workload(layout, dropout=0.1, attention_dropout=attention)
                speed = results.speed("dropout", side.key, shape)
                if speed is None:
                    continue
                base = results.speed("speed", side.key, Workload(layout))
                share = f"{speed.tokens_per_second / base.tokens_per_second:.2f}" if base else "-"
                kind = "hidden and attention 0.1" if attention else "hidden 0.1"
                yield row(side.name, _LAYOUT_NAMES[layout], kind, figures(speed)[0], share)


def activations_table(results: Results) -> Iterator[str]:
    """What a layer keeps on one rank, and what keeping less costs."""
    yield from head("side", "layout", "recompute", "bytes / sbh", "speed over none")
    for layout in LAYOUTS:
        shape, name = Workload(layout, dropout=0.1), _LAYOUT_NAMES[layout]
        if kept := results.found("activations", MEGATRON.key, shape):
            yield row(MEGATRON.name, name, "none", f"{kept[-1]['bytes_per_sbh']:.2f}", "")
        for granularity in GRANULARITIES:
            override = [f"parallel.recompute_granularity={granularity}"]
            kept = results.found("activations", OURS.key, shape, override)
            if not kept:
                continue
            base = results.speed("speed", OURS.key, Workload(layout))
            slower = results.speed("recompute", OURS.key, Workload(layout), override)
            share = f"{base.median_s / slower.median_s:.2f}" if base and slower else ""
            yield row(OURS.name, name, granularity, f"{kept[-1]['bytes_per_sbh']:.2f}", share)


def scaling_table(results: Results) -> Iterator[str]:
    """Ours and the plain loop on one process, over length, micro-batch and model size."""
    yield from head(
        "s", "micro-batch", "layers", "h", "ours, tokens/s", "plain, tokens/s", "ratio", "peak MB"
    )
    for shape in scaling_shapes():
        ours, plain = (results.speed("scaling", side.key, shape) for side in (OURS, PLAIN))
        sizes = (shape.seq_length, shape.micro_batch, shape.num_layers, shape.hidden_size)
        if ours is None and plain is None:
            continue
        speeds = [figures(speed)[0] if speed else "-" for speed in (ours, plain)]
        share = f"{plain.median_s / ours.median_s:.2f}" if ours and plain else "-"
        peaks = " / ".join(f"{speed.peak_mb:.0f}" if speed else "-" for speed in (ours, plain))
        yield row(*map(str, sizes), *speeds, share, peaks)


# By the name of its marks: the kinds of visits that it shows, and what makes it.
TABLES: dict[str, tuple[set[str], Callable[[Results], Iterator[str]]]] = {
    "claims": ({"speed", "dropout", "activations", "recompute", "overhead"}, claims_table),
    "speed": ({"speed"}, speed_table),
    "dropout": ({"dropout"}, dropout_table),
    "activations": ({"activations"}, activations_table),
    "scaling": ({"scaling"}, scaling_table),
}
