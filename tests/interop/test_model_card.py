"""The model card, for any state of the metrics."""

from pathlib import Path

import pytest

from configs import Config, SourceConfig
from interop.model_card import _corpus, _evaluation, _origin, _training

ROW = '{"step": 4, "eval/loss": 2.5, "eval/perplexity": 12.0, "eval/bits_per_byte": 1.25}\n'


@pytest.mark.parametrize(
    "after",
    [
        "",
        '{"step": 6, "eval/loss": 1.0, "eval/perpl',  # cut off by a kill
        '{"step": 5, "eval/loss": null, "eval/perplexity": null, "eval/bits_per_byte": null}\n',
        '{"step": 5, "train/loss": 3.0}\n',
        ROW.replace('"step": 4', '"step": 9'),  # after the checkpoint
    ],
)
def test_the_last_valid_evaluation(tmp_path: Path, after: str) -> None:
    """It is finite, complete and not after the checkpoint."""
    (tmp_path / "metrics.jsonl").write_text(ROW + after)
    assert "at step 4: 2.5 nats per token" in _evaluation(tmp_path / "metrics.jsonl", 6)


def test_no_evaluation(tmp_path: Path) -> None:
    """The file may be missing."""
    assert _evaluation(tmp_path / "metrics.jsonl", 6) == "It was not evaluated during training."


def test_local_paths_are_not_published(tmp_path: Path) -> None:
    """Of a local folder only the name is given."""
    assert _corpus(SourceConfig("hub", "org/books")) == "`org/books` (hub)"
    assert _corpus(SourceConfig("hub", str(tmp_path))) == f"`{tmp_path.name}` (hub)"
    assert _corpus(SourceConfig("text", str(tmp_path))) == f"`{tmp_path.name}` (text)"


def test_an_imported_model_is_not_called_trained() -> None:
    """Its configuration names a text by default, of which it has seen nothing."""
    progress = {"step": 0, "tokens": 0}
    state = {"progress": progress, "data_fingerprint": None, "imported_from": "org/model"}
    imported = "imported from `org/model` with Microtron and not trained further."
    assert _training(Config(), state) == imported
    del state["imported_from"]  # of an older import
    assert _training(Config(), state) == "imported with Microtron and not trained further."
    state = {"progress": {"step": 6, "tokens": 5000}, "data_fingerprint": "1"}
    assert _training(Config(), state) == (
        "trained with Microtron: 6 steps,\n5,000 tokens of the Python standard library's source "
        "text."
    )


def test_the_origin_of_the_weights() -> None:
    """All stages before this one; nothing for random initial weights."""
    first = {"run": "a", "step": 1000, "tokens": 7, "wandb_id": "1", "origin": None}
    second = {"run": "b", "step": 30, "tokens": 5000, "wandb_id": "2", "origin": first}
    assert _origin({"origin": second}) == (
        "\nIt began with the weights of `b` (step 30, 5,000 tokens), which began with those of `a` "
        "(step 1,000, 7 tokens)."
    )
    assert _origin({"origin": None}) == _origin({}) == ""
