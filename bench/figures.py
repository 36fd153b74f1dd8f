"""Draws docs/figures/*.png from the results beside them; `make figures`.

    python -m bench.figures [--output DIR]

A figure whose file of results does not exist is left out. Where the numbers are from:

    curves.json   python -m bench.curves
    speed.json    docs/results.md, tokens per second on two cores
    memory.json   python -m bench.ours --measure=activations, bytes over s b h of one layer and rank
    laptop.json   [{"label", "step", "time_s", "bits_per_byte"}, ...] of evaluations of runs
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
_NAMES = {
    "ours": "Microtron, dropout 0.1",
    "megatron": "megatron-core 0.16.1, dropout 0.1",
    "titan": "torchtitan 0.3.0, no dropout",
}
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "savefig.dpi": 150,
}


def distances(losses: list[list[float]]) -> list[list[float]]:
    """Return how far each curve is from the mean of all, at each step."""
    means = [sum(step) / len(step) for step in zip(*losses, strict=True)]
    return [[abs(a - b) for a, b in zip(one, means, strict=True)] for one in losses]


def curves(result: dict[str, Any]) -> Any:
    """Losses of each trainer on its layouts and, below, their distances from the mean."""
    sides = list(dict.fromkeys(curve["side"] for curve in result["curves"]))
    figure, axes = plt.subplots(
        2, len(sides), figsize=(10, 5), sharex=True, sharey="row", layout="constrained"
    )
    for column, side in enumerate(sides):
        above, below = axes[:, column]
        of_side = [curve for curve in result["curves"] if curve["side"] == side]
        apart = distances([curve["losses"] for curve in of_side])
        for curve, distance in zip(of_side, apart, strict=True):
            steps = range(1, len(distance) + 1)
            label = curve["layout"].replace("+", " + ")
            above.plot(steps, curve["losses"], linewidth=1.0, label=label)
            below.plot(steps, [max(each, 1e-9) for each in distance], linewidth=0.8)
        above.set_title(f"{_NAMES[side]}\n{len(of_side)} layouts")
        above.legend(ncols=2)
        below.set(yscale="log", xlabel="step")
        worst = max(map(max, apart))
        below.text(0.97, 0.04, f"at most {worst:.1e}", transform=below.transAxes, ha="right")
    axes[0, 0].set_ylabel("training loss (nats)")
    axes[1, 0].set_ylabel("|loss - mean over layouts|")
    return figure


def speed(result: list[dict[str, Any]]) -> Any:
    """Bars of tokens per second, a panel for each processor and precision."""
    panels = list(dict.fromkeys((row["processor"], row["precision"]) for row in result))
    trainers = list(dict.fromkeys(row["trainer"] for row in result))
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3.4), layout="constrained")
    for axis, (processor, precision) in zip(axes, panels, strict=True):
        rows = [r for r in result if (r["processor"], r["precision"]) == (processor, precision)]
        layouts = list(dict.fromkeys(row["layout"] for row in rows))
        for number, trainer in enumerate(trainers):
            bars = [row for row in rows if row["trainer"] == trainer]
            places = [layouts.index(row["layout"]) + 0.15 * (number - 2) for row in bars]
            heights = [row["tokens_per_second"] for row in bars]
            axis.bar(places, heights, 0.14, label=trainer, color=f"C{number}")
        axis.set_xticks(range(len(layouts)), layouts)
        axis.set_title(f"{processor}, {precision}, {rows[0]['date']}", fontsize=8)
    axes[0].set_ylabel("tokens per second, two cores")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def memory(result: dict[str, Any]) -> Any:
    """Bytes that a layer keeps for backward: measured bars, and the formula as marks."""
    rows = result["rows"]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    kinds = list(dict.fromkeys(row["recompute"] for row in rows))
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for number, kind in enumerate(kinds):
        bars = [row for row in rows if row["recompute"] == kind]
        places = [layouts.index(row["layout"]) + 0.27 * (number - 1) for row in bars]
        axis.bar(places, [row["bytes_per_sbh"] for row in bars], 0.25, label=kind)
        formula = [row["formula"] for row in bars]
        label = None if number else "formula"
        axis.scatter(places, formula, s=120, c="black", marker="_", zorder=3, label=label)
    axis.set_xticks(range(len(layouts)), [name.replace("+", " + ") for name in layouts])
    axis.set(ylabel="bytes / (s b h), one layer of one rank", title="Kept for backward, bf16")
    axis.legend(title="recompute")
    return figure


def laptop(result: list[dict[str, Any]]) -> Any:
    """Bits per byte of held-out text over the time of training."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for label in dict.fromkeys(row["label"] for row in result):
        rows = [row for row in result if row["label"] == label]
        minutes = [row["time_s"] / 60 for row in rows]
        axis.plot(minutes, [row["bits_per_byte"] for row in rows], marker=".", label=label)
    axis.set(xlabel="minutes of training", ylabel="bits per byte of held-out text")
    axis.legend()
    return figure


_FIGURES: dict[str, Callable[[Any], Any]] = {
    "curves": curves,
    "speed": speed,
    "memory": memory,
    "laptop": laptop,
}


def main() -> int:
    """Draw every figure whose results exist."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FOLDER)
    output = parser.parse_args().output
    mpl.use("Agg")
    mpl.rcParams.update(_STYLE)
    for name, draw in _FIGURES.items():
        results = FOLDER / f"{name}.json"
        if results.exists():
            figure = draw(json.loads(results.read_text("utf-8")))
            # No date or version inside, so that the same numbers give the same file.
            figure.savefig(output / f"{name}.png", metadata={"Software": None})
            plt.close(figure)
        sys.stdout.write(f"{name}: {'drawn' if results.exists() else f'no {results}'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
