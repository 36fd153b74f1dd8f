"""Settings that a resume may change, and those that it refuses to change."""

from pathlib import Path
from typing import Any

import pytest

from checkpoints import Checkpoint, CheckpointError
from configs import Config, DataConfig, OptimizerConfig, WeightedSource, flatten
from tests.data_corpora import small_tokenizer
from training import resume as module
from training.resume import find_own_checkpoint
from training.state import RECIPE_VERSIONS

TEXT = "the fingerprint of the text"


def mixture(*places: str, weights: tuple[float, ...] = (3.0, 1.0)) -> Config:
    """A configuration of a mixture of folders."""
    sources = [
        WeightedSource("text", place, weight=w) for place, w in zip(places, weights, strict=True)
    ]
    return Config(data=DataConfig(sources=tuple(sources)))


def resume(
    monkeypatch: pytest.MonkeyPatch, before: Config, now: Config, text: str = TEXT, **more: Any
) -> None:
    """Look for the checkpoint of a run with other settings and other text."""
    fingerprints = {"text_fingerprint": TEXT, "data_fingerprint": "x", "tokenizer_fingerprint": "y"}
    state = {"config": flatten(before), "progress": {"step": 5}, **fingerprints, **more}
    checkpoint = Checkpoint(Path("step_00000005"), 5, state, {}, {})
    monkeypatch.setattr(module, "find_checkpoint", lambda *_: checkpoint)
    mesh: Any = None
    folder: Any = type("Folder", (), {"checkpoints": Path("unused"), "starts_over": False})
    assert find_own_checkpoint(now, text, mesh, folder) is checkpoint


def test_the_same_text_may_have_another_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the fingerprint counts, for one source and for several."""
    one, other = (Config(data=DataConfig("text", path)) for path in "ab")
    resume(monkeypatch, one, other)
    resume(monkeypatch, mixture("a", "b"), mixture("/moved/a", "b"))
    for same in (one, mixture("a", "b")):
        with pytest.raises(CheckpointError, match=r"the text .* has changed since .*other text"):
            resume(monkeypatch, same, same, "other text")


@pytest.mark.parametrize(
    ("before", "now", "differences"),
    [
        (
            DataConfig("text", "a"),
            DataConfig(),
            "data.path=null (was a), data.source=python_stdlib ",
        ),
        (mixture("a", "b").data, mixture("c", "b").data, "data.sources[0].path=c (was a); set "),
        (DataConfig("text", "a"), DataConfig("text", "a", "b"), "data.text_field=b (was text); "),
    ],
    ids=["source", "mixture", "column"],
)
def test_settings_that_say_which_text_is_read_are_named(
    monkeypatch: pytest.MonkeyPatch, before: DataConfig, now: DataConfig, differences: str
) -> None:
    """Rather than that the text has changed, if they differ and so does the text."""
    with pytest.raises(CheckpointError) as caught:
        resume(monkeypatch, Config(data=before), Config(data=now), "other text")
    assert f"data.sources is another with {differences}" in str(caught.value)
    assert "use config=config.yaml, or choose another run.name" in str(caught.value)


def test_mixture_weights_cannot_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights decide the order of samples, and no fingerprint covers them."""
    with pytest.raises(CheckpointError, match=r"data\.sources=\[1\.0, 3\.0\] \(was \[3\.0, 1\.0\]"):
        resume(monkeypatch, mixture("a", "b"), mixture("a", "b", weights=(1.0, 3.0)))
    resume(monkeypatch, Config(data=DataConfig("text", "a")), mixture("a", weights=(7.0,)))


@pytest.mark.parametrize("more", [{}, {"data_fingerprint": None}], ids=["trained", "imported"])
def test_another_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch, more: Any) -> None:
    """It has other moments; its other settings may change."""
    adamw, muon = (Config(optimizer=OptimizerConfig(name)) for name in ("adamw", "muon"))
    message = r"optimizer\.name=muon \(was adamw\); change it back, or choose another run\.name"
    with pytest.raises(CheckpointError, match=message):
        resume(monkeypatch, adamw, muon, **more)
    faster = Config(optimizer=OptimizerConfig("muon", muon_lr=0.1, muon_momentum=0.9))
    resume(monkeypatch, muon, faster, **more)


def test_another_tokenizer_is_refused_before_the_text_is_tokenized(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the tokenizer is given; otherwise it must be trained first."""
    path = tmp_path / "given.model"
    path.write_bytes(small_tokenizer().content)
    given = DataConfig("text", "a", tokenizer=str(path))
    with pytest.raises(CheckpointError, match=r"the tokenizer is another with data\.tokenizer="):
        resume(monkeypatch, Config(data=DataConfig("text", "a")), Config(data=given))


@pytest.mark.parametrize("name", RECIPE_VERSIONS)
def test_a_resume_needs_the_recipe_versions_of_its_run(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A checkpoint without versions has version 1. Only samples and masks decide the next step."""
    config = Config(data=DataConfig("text", "a"))
    resume(monkeypatch, config, config)
    monkeypatch.setitem(RECIPE_VERSIONS, name, 2)
    resume(monkeypatch, config, config, recipe_versions={name: 2})
    imported = {"data_fingerprint": None}
    resume(monkeypatch, config, config, **imported)
    for stored in ({}, {name: 1}, {name: 3}):
        if name in ("dropout_masks", "sample_order"):
            message = rf"recipe_version of {name} wrote it \({stored.get(name, 1)}, here 2\);"
            with pytest.raises(CheckpointError, match=message):
                resume(monkeypatch, config, config, recipe_versions=stored)
        else:
            resume(monkeypatch, config, config, recipe_versions=stored)
