"""The card of an exported model: whatever state the run's metrics are in."""

from pathlib import Path

import pytest

from configs import SourceConfig
from interop.model_card import _corpus, _evaluation

ROW = '{"step": 4, "eval/loss": 2.5, "eval/perplexity": 12.0, "eval/bits_per_byte": 1.25}\n'


@pytest.mark.parametrize(
    "after",
    [
        "",
        '{"step": 6, "eval/loss": 1.0, "eval/perpl',  # torn by a kill
        '{"step": 5, "eval/loss": null, "eval/perplexity": null, "eval/bits_per_byte": null}\n',
        '{"step": 5, "train/loss": 3.0}\n',
        ROW.replace('"step": 4', '"step": 9'),  # after the checkpoint
    ],
)
def test_the_last_evaluation_that_there_is(tmp_path: Path, after: str) -> None:
    """Finite, whole and not after the checkpoint."""
    (tmp_path / "metrics.jsonl").write_text(ROW + after)
    assert "at step 4: 2.5 nats per token" in _evaluation(tmp_path / "metrics.jsonl", 6)


def test_no_evaluation_is_told(tmp_path: Path) -> None:
    """Also without the file."""
    assert _evaluation(tmp_path / "metrics.jsonl", 6) == "It was not evaluated in training."


def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    """A folder in place of a hub's name is a path too."""
    assert _corpus(SourceConfig("hub", "org/books")) == "`org/books` (hub)"
    assert _corpus(SourceConfig("hub", str(tmp_path))) == f"`{tmp_path.name}` (hub)"
    assert _corpus(SourceConfig("text", str(tmp_path))) == f"`{tmp_path.name}` (text)"
