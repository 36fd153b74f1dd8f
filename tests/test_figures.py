"""docs/figures: pictures of the files beside them."""

import json
from pathlib import Path

import pytest

from bench import figures

FILES = sorted(figures.FOLDER.glob("*.json"))


def test_distances_are_from_the_mean_of_each_step() -> None:
    """Of all curves."""
    assert figures.distances([[1.0, 2.0], [3.0, 2.0]]) == [[1.0, 0.0], [1.0, 0.0]]


def test_losses_of_megatron_depend_on_the_layout_and_ours_do_not() -> None:
    """As the first picture of the README shows; torchtitan's model has no dropout."""
    result = json.loads((figures.FOLDER / "curves.json").read_text())
    worst = {}
    for side, layouts in (("ours", 8), ("megatron", 6), ("titan", 6)):
        losses = [one["losses"] for one in result["curves"] if one["side"] == side]
        assert len(losses) == layouts
        worst[side] = max(map(max, figures.distances(losses)))
    assert worst["ours"] < 1e-6
    assert worst["megatron"] > 1000 * worst["ours"]
    assert worst["titan"] < 1e-5


@pytest.mark.slow
def test_every_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its file of results."""
    monkeypatch.setattr("sys.argv", ["figures", "--output", str(tmp_path)])
    assert figures.main() == 0
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == [path.stem for path in FILES]
