"""Mixtures of sources: shares, epochs, and an order that depends on nothing else."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import DataConfig, WeightedSource
from data.corpus.build import sample_shares
from data.rows import Rows
from data.sampler import SampleOrder
from data.token_file import JoinedTokens
from tests.data_corpora import prepare_corpus, random_text, small_tokenizer, token_file

WEIGHTS = [(1.0,), (1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1), (5.0, 1e-6), (1.0, 2.0, 3.0, 4.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_stretch_of_samples_follows_the_weights(weights: tuple[float, ...]) -> None:
    """Counts are exact to one sample per source and the resolution of the schedule."""
    order = SampleOrder(weights, [1] * len(weights), seed=0)
    samples = np.arange(70_000, 140_000)  # over the end of a turn of the schedule
    sources, _ = order.split(samples)
    for first, last in ((0, 10), (5, 105), (30_000, 70_000)):
        counts = np.bincount(sources[first:last], minlength=len(weights))
        exact = np.array(weights) / sum(weights) * (last - first)
        assert np.all(np.abs(counts - exact) <= len(weights) + (last - first) / 2**16)


@pytest.mark.parametrize("weights", [[1000.0] + [1.0] * 300, [50.0] + [1.0] * 50, [1.0] * 7])
def test_small_sources_are_spread_evenly(weights: list[float]) -> None:
    """Together they have their share of every stretch of samples."""
    sources, _ = SampleOrder(weights, [1] * len(weights), 0).split(np.arange(20_000))
    is_small = np.cumsum(sources != 0)
    exact = np.arange(1, 20_001) * sum(weights[1:]) / sum(weights)
    assert np.abs(is_small - exact).max() < 4


def test_tokenizer_sample_is_divided_by_weight() -> None:
    """Other sources fill in for a source that is too small; a single source gives all of it."""
    assert sample_shares([1.0], [10]) == [8_000_000]
    assert sample_shares([3.0, 1.0], [10**9, 10**9]) == [6_000_000, 2_000_000]
    assert sample_shares([1000.0, 1.0], [100_000, 10**12]) == [100_000, 7_900_000]
    assert sample_shares([1.0, 1.0, 2.0], [10, 10**9, 20]) == [10, 7_999_970, 20]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_samples_of_a_source_are_numbered_without_gaps(weights: tuple[float, ...]) -> None:
    """This holds across repeats of the schedule, and any sample can be looked up alone."""
    order = SampleOrder(weights, [1] * len(weights), seed=0)
    samples = np.arange(200_000)
    sources, numbers = order.split(samples)
    for source in range(len(weights)):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))
    alone = [order.split(samples[i : i + 1]) for i in (0, 65_535, 65_536, 199_999)]
    assert [(int(s[0]), int(n[0])) for s, n in alone] == [
        (int(sources[i]), int(numbers[i])) for i in (0, 65_535, 65_536, 199_999)
    ]
    for count in (0, 1, 65_536, 65_537, 200_000):
        expected = np.bincount(sources[:count], minlength=len(weights)).tolist()
        assert order.epochs(count) == expected  # of one row each


def test_each_row_of_a_source_comes_once_per_epoch() -> None:
    """Each source has its own epochs."""
    num_rows = (7, 40, 13)
    order = SampleOrder((1.0, 2.0, 1.0), num_rows, seed=3)
    rows = order.rows(0, 1600)
    first = 0
    for source, size in enumerate(num_rows):
        mine = rows[(rows >= first) & (rows < first + size)] - first
        whole = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(whole) >= 10
        assert all(sorted(epoch) == list(range(size)) for epoch in whole.tolist())
        assert order.epochs(1600)[source] == pytest.approx(len(mine) / size)
        first += size


def test_order_has_no_history() -> None:
    """Any stretch of samples is the same, whatever was computed before it."""
    order = SampleOrder((0.6, 0.3, 0.1), (50, 11, 200), seed=9)
    everything = order.rows(0, 2000)
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, size = int(rng.integers(0, 1800)), int(rng.integers(1, 200))
        assert np.array_equal(order.rows(first, size), everything[first : first + size])


def test_joined_tokens_are_those_of_the_parts() -> None:
    """Documents follow each other, and a span reads from the part it belongs to."""
    parts = [token_file([5, 3]), token_file([4]), token_file([6, 2, 7])]
    joined = JoinedTokens(parts)
    assert (joined.num_tokens, joined.num_documents) == (27, 6)
    documents = [
        part.span(int(start), int(end)).tolist()
        for part in parts
        for start, end in zip(part.document_offsets[:-1], part.document_offsets[1:], strict=True)
    ]
    offsets = joined.document_offsets.tolist()
    found = [joined.span(a, b).tolist() for a, b in itertools.pairwise(offsets)]
    assert found == documents
    with pytest.raises(AssertionError, match="inside one source"):
        joined.span(6, 10)


def test_no_rows_have_no_spans() -> None:
    """An empty request gives empty arrays."""
    rows = Rows(token_file([5, 3]), 8, "pad")
    spans = rows.spans(np.empty(0, dtype=np.int64))
    assert [len(part) for part in spans] == [0, 0, 0, 0]


def write_sources(folder: Path) -> list[WeightedSource]:
    """Write three folders of texts of different lengths."""
    for name, num_texts, num_lines in (("a", 12, 20), ("b", 5, 60), ("c", 30, 5)):
        (folder / name).mkdir()
        for number in range(num_texts):
            text = random_text(hash((len(name), num_lines, number)) % 10_000, num_lines)
            (folder / name / f"{number:02}.txt").write_text(text)
    return [WeightedSource("text", str(folder / name)) for name in "abc"]


def config_of(folder: Path, *sources: WeightedSource, **changes: Any) -> DataConfig:
    """Return the settings of a mixture with its cache in the folder."""
    return DataConfig(
        sources=sources,
        vocab_size=320,
        validation_fraction=0.2,
        cache_directory=str(folder / "cache"),
        **changes,
    )


def test_a_source_is_tokenized_once_whatever_mixture_it_is_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a given tokenizer, adding a source tokenizes only that source."""
    sources = write_sources(tmp_path)
    model = tmp_path / "given.model"
    model.write_bytes(small_tokenizer().content)
    with caplog.at_level("INFO"):
        two = prepare_corpus(config_of(tmp_path, *sources[:2], tokenizer=str(model)), 16, 0)
        first_log = caplog.text
        caplog.clear()
        three = prepare_corpus(config_of(tmp_path, *sources, tokenizer=str(model)), 16, 0)
    assert first_log.count("tokenized data.sources") == 2
    assert caplog.text.count("tokenized data.sources") == 1
    assert "tokenized data.sources[2]" in caplog.text
    for before, after in zip(two.train.parts, three.train.parts, strict=False):
        assert np.array_equal(before.document_offsets, after.document_offsets)
    assert three.fingerprint != two.fingerprint
    alone = DataConfig(
        source="text",
        path=sources[0].path,
        tokenizer=str(model),
        vocab_size=320,
        validation_fraction=0.2,
        cache_directory=str(tmp_path / "cache"),
    )
    caplog.clear()
    with caplog.at_level("INFO"):
        prepare_corpus(alone, 16, 0)
    assert "tokenized data" not in caplog.text


def test_a_trained_tokenizer_covers_the_whole_mixture(tmp_path: Path) -> None:
    """It encodes all sources, and the summary has their counts and sums."""
    sources = write_sources(tmp_path)
    corpus = prepare_corpus(config_of(tmp_path, *sources), 16, 0)
    assert len(corpus.train.parts) == len(corpus.weights) == 3
    parts = corpus.summary["sources"]
    assert list(parts) == ["data.sources[0]", "data.sources[1]", "data.sources[2]"]
    assert corpus.summary["train"]["tokens"] == corpus.train.num_tokens
    assert corpus.summary["records"] == sum(part["records"] for part in parts.values()) == 47
    again = prepare_corpus(config_of(tmp_path, *sources), 16, 0)
    assert again.fingerprint == corpus.fingerprint
    assert not list((tmp_path / "cache").glob("text-*[!k]"))  # only lock files remain


def test_a_source_that_fills_no_row_is_named(tmp_path: Path) -> None:
    """Its weight cannot be honoured, so this is an error."""
    sources = write_sources(tmp_path)
    (tmp_path / "tiny.txt").write_text("tiny")
    tiny = WeightedSource("text", str(tmp_path / "tiny.txt"))
    with pytest.raises(ValueError, match=r"training tokens of data\.sources\[1\]\.source=text do"):
        prepare_corpus(config_of(tmp_path, sources[0], tiny), 64, 0)
