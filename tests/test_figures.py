"""docs/figures: pictures of the files beside them."""

from pathlib import Path

import pytest

from bench import figures

FILES = sorted(figures.FOLDER.glob("*.json"))


def test_distances_are_from_the_mean_of_each_step() -> None:
    """Of all curves."""
    assert figures.distances([[1.0, 2.0], [3.0, 2.0]]) == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.slow
def test_every_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its file of results."""
    monkeypatch.setattr("sys.argv", ["figures", "--output", str(tmp_path)])
    assert figures.main() == 0
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == [path.stem for path in FILES]
