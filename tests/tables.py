"""The tables of docs/parity.md, and the program behind `make parity`.

Against transformers: every case of tests/huggingface.py on every layout. Against ourselves: the
losses of six steps of the shipped debug configurations, on every layout, beside one process.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, run_on
from tests.huggingface import CASES, LAYOUTS, measure, write_case
from tests.lines import ROOT
from tests.runs import rows, train_on

PAGE = ROOT / "docs" / "parity.md"
# Micro-batches are split differently on each.
MICRO_BATCH_SIZES = {
    Layout(tp=2): 8,
    Layout(tp=2, sp=False): 2,
    Layout(tp=4): 1,
    Layout(dp=2): 4,
    Layout(tp=2, dp=2): 2,
}
RUNS = {
    f"{config}, {mode}, {precision}": (
        f"config={config}.yaml",
        f"data.sequence_mode={mode}",
        f"train.precision={precision}",
    )
    for config, mode in (("gpt_debug", "pack"), ("gpt_debug", "pad"), ("llama_debug", "pack"))
    for precision in ("fp32", "bf16")
}


def measure_to_file(mesh: Mesh, name: str, path: Path, report: Path) -> None:
    """Leave what `measure` finds in a file; rank 0 writes."""
    difference = measure(mesh, name, path)
    if mesh.world.rank == 0:
        report.write_text(json.dumps(dataclasses.asdict(difference)))


def against_transformers(folder: Path) -> str:
    """Largest differences in logits and in gradients, as Markdown."""
    lines = table_head("model", LAYOUTS)
    for name in CASES:
        path, report, cells = folder / "case", folder / "report", []
        write_case(name, path)
        for layout in LAYOUTS:
            run_on(layout, measure_to_file, name=name, path=path, report=report)
            found = json.loads(report.read_text())
            cells.append(f"{found['logits']:.1e} / {found['gradients']:.1e}")
        lines.append(table_row(name, cells))
    return "\n".join(lines)


def curve(folder: Path, name: str, layout: Layout, micro_batch_size: int) -> dict[str, list[float]]:
    """Losses and gradient norms of six steps."""
    directory = folder / name / str(layout)
    train_on(
        layout,
        [
            *RUNS[name],
            "run.name=test",
            f"run.directory={directory}",
            "train.train_steps=6",
            f"train.micro_batch_size={micro_batch_size}",
            "optimizer.lr_warmup_steps=2",
            "evaluate.interval=0",
            "checkpoint.save_interval=0",
            "logging.wandb=disabled",
        ],
    )
    steps = rows(directory)
    return {key: [row[f"train/{key}"] for row in steps] for key in ("loss", "grad_norm")}


def against_one_process(folder: Path) -> str:
    """Largest relative differences of losses and gradient norms, as Markdown."""
    lines = table_head("run", tuple(MICRO_BATCH_SIZES))
    for name in RUNS:
        expected, cells = curve(folder, name, ONE_RANK, 4), []
        for layout, micro_batch_size in MICRO_BATCH_SIZES.items():
            found = curve(folder, name, layout, micro_batch_size)
            worst = [
                max(abs(a / b - 1) for a, b in zip(found[key], expected[key], strict=True))
                for key in ("loss", "grad_norm")
            ]
            cells.append(f"{worst[0]:.1e} / {worst[1]:.1e}")
        lines.append(table_row(name, cells))
    return "\n".join(lines)


def table_head(corner: str, layouts: tuple[Layout, ...]) -> list[str]:
    """The first two lines of a table with a column for each layout."""
    return [table_row(corner, [str(layout) for layout in layouts]), "|---" * len(layouts) + "|---|"]


def table_row(name: str, cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join([name, *cells])} |"


def put_between_marks(name: str, text: str) -> None:
    """Replace a table of the page, which stands between two comments."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = PAGE.read_text().partition(begin)
    assert found, f"{PAGE} has no {begin!r}"
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Measure all and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        put_between_marks("against transformers", against_transformers(Path(folder)))
        put_between_marks("against one process", against_one_process(Path(folder)))
    sys.stdout.write(f"wrote {PAGE}\n")


if __name__ == "__main__":
    main()
