"""Mixtures of sources: their shares, their epochs, and that order depends on nothing else."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import Config, DataConfig, ModelConfig, TrainConfig, WeightedSource
from data import IGNORED_TARGET, BatchLoader, Corpus, prepare_corpus
from data.corpus.prepare import sample_shares
from data.loader import rows_of_corpus
from data.mixture import JoinedRows, JoinedTokens, SampleOrder, make_schedule
from data.rows import PaddedRows
from tests.data_corpora import random_text, small_tokenizer, token_file

WEIGHTS = [(1.0,), (1.0, 1.0), (3.0, 1.0), (0.7, 0.2, 0.1), (5.0, 1e-6), (1.0, 2.0, 3.0, 4.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_stretch_of_samples_has_the_shares_of_the_weights(weights: tuple[float, ...]) -> None:
    """To within one sample for each source and the resolution of the schedule."""
    schedule = make_schedule(weights)
    samples = np.arange(70_000, 140_000)  # over the end of a turn of the schedule
    sources, _ = schedule.split(samples)
    for first, last in ((0, 10), (5, 105), (30_000, 70_000)):
        counts = np.bincount(sources[first:last], minlength=len(weights))
        exact = np.array(weights) / sum(weights) * (last - first)
        assert np.all(np.abs(counts - exact) <= len(weights) + (last - first) / 2**16)


@pytest.mark.parametrize("weights", [[1000.0] + [1.0] * 300, [50.0] + [1.0] * 50, [1.0] * 7])
def test_small_sources_do_not_come_all_at_once(weights: list[float]) -> None:
    """Together they have their share of every stretch, as the large one has of its own."""
    sources, _ = make_schedule(weights).split(np.arange(20_000))
    is_small = np.cumsum(sources != 0)
    exact = np.arange(1, 20_001) * sum(weights[1:]) / sum(weights)
    assert np.abs(is_small - exact).max() < 4


def test_a_sample_for_the_tokenizer_is_shared_by_weight() -> None:
    """What a source does not have goes to the others; a source alone is asked for all."""
    assert sample_shares([1.0], [10]) == [8_000_000]
    assert sample_shares([3.0, 1.0], [10**9, 10**9]) == [6_000_000, 2_000_000]
    assert sample_shares([1000.0, 1.0], [100_000, 10**12]) == [100_000, 7_900_000]
    assert sample_shares([1.0, 1.0, 2.0], [10, 10**9, 20]) == [10, 7_999_970, 20]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_samples_of_each_source_are_numbered_without_gaps(weights: tuple[float, ...]) -> None:
    """Over the turns of the schedule; and any sample is found without the ones before it."""
    schedule = make_schedule(weights)
    samples = np.arange(200_000)
    sources, numbers = schedule.split(samples)
    for source in range(len(weights)):
        mine = numbers[sources == source]
        assert np.array_equal(mine, np.arange(len(mine)))
    alone = [schedule.split(samples[i : i + 1]) for i in (0, 65_535, 65_536, 199_999)]
    assert [(int(s[0]), int(n[0])) for s, n in alone] == [
        (int(sources[i]), int(numbers[i])) for i in (0, 65_535, 65_536, 199_999)
    ]
    for count in (0, 1, 65_536, 65_537, 200_000):
        expected = np.bincount(sources[:count], minlength=len(weights)).tolist()
        assert schedule.samples_of(count) == expected


def test_each_row_of_a_source_comes_once_an_epoch() -> None:
    """Sources of different sizes have epochs of their own."""
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
    """Cut anywhere into steps of any size, dealt over any number of ranks, the samples are the
    same ones."""
    order = SampleOrder((0.6, 0.3, 0.1), (50, 11, 200), seed=9)
    everything = order.rows(0, 2000)
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, size = int(rng.integers(0, 1800)), int(rng.integers(1, 200))
        assert np.array_equal(order.rows(first, size), everything[first : first + size])


def test_joined_tokens_are_those_of_the_parts() -> None:
    """Documents follow each other, and a span reads from the part that it lies in."""
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
    """Whatever asks for them."""
    rows = JoinedRows([PaddedRows(token_file([5, 3]), 8)], [8])
    spans = rows.spans(np.empty(0, dtype=np.int64))
    assert [len(part) for part in vars(spans).values()] == [0, 0, 0, 0]


def write_sources(folder: Path) -> list[WeightedSource]:
    """Writes three folders of texts of different length."""
    for name, num_texts, num_lines in (("a", 12, 20), ("b", 5, 60), ("c", 30, 5)):
        (folder / name).mkdir()
        for number in range(num_texts):
            text = random_text(hash((len(name), num_lines, number)) % 10_000, num_lines)
            (folder / name / f"{number:02}.txt").write_text(text)
    return [WeightedSource("text", str(folder / name)) for name in "abc"]


def config_of(folder: Path, *sources: WeightedSource, **changes: Any) -> DataConfig:
    """Returns a configuration of a mixture with its cache in the folder."""
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
    """With one tokenizer: adding a source leaves the others as they are."""
    sources = write_sources(tmp_path)
    model = tmp_path / "given.model"
    model.write_bytes(small_tokenizer().model)
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


def test_a_trained_tokenizer_is_of_the_whole_mixture(tmp_path: Path) -> None:
    """All sources are encoded by it, and the summary has each of them and their sums."""
    sources = write_sources(tmp_path)
    corpus = prepare_corpus(config_of(tmp_path, *sources), 16, 0)
    assert len(corpus.train.parts) == len(corpus.weights) == 3
    parts = corpus.summary["sources"]
    assert list(parts) == ["data.sources[0]", "data.sources[1]", "data.sources[2]"]
    assert corpus.summary["train"]["tokens"] == corpus.train.num_tokens
    assert corpus.summary["records"] == sum(part["records"] for part in parts.values()) == 47
    again = prepare_corpus(config_of(tmp_path, *sources), 16, 0)
    assert again.fingerprint == corpus.fingerprint
    assert not list((tmp_path / "cache").glob("text-*[!k]"))  # only locks of texts are left


def test_a_source_that_fills_no_row_is_named(tmp_path: Path) -> None:
    """Its weight could not be kept."""
    sources = write_sources(tmp_path)
    (tmp_path / "tiny.txt").write_text("tiny")
    tiny = WeightedSource("text", str(tmp_path / "tiny.txt"))
    with pytest.raises(ValueError, match=r"training tokens of data\.sources\[1\]\.source=text do"):
        prepare_corpus(config_of(tmp_path, sources[0], tiny), 64, 0)


MIXTURE = (WeightedSource("text", "a", weight=3.0), WeightedSource("text", "b"), WeightedSource())


def mixed_corpus() -> Corpus:
    """Returns three sources with weights 3, 1, 1; no two tokens of a source are equal."""
    tokens = JoinedTokens(
        [token_file([30, 9, 40, 3, 25]), token_file([50, 6]), token_file([8] * 20)]
    )
    return Corpus(small_tokenizer(), Path("unused"), tokens, tokens, "", {}, (3.0, 1.0, 1.0))


def mixed_config(mode: str, micro_batch_size: int) -> Config:
    """Returns settings for it: rows of 8, steps of 12 rows."""
    return Config(
        model=ModelConfig(seq_length=8),
        data=DataConfig(
            sources=MIXTURE,
            sequence_mode="pad" if mode == "pad" else "pack",
            packing="best_fit" if mode == "best_fit" else "stream",
        ),
        train=TrainConfig(global_batch_size=12, micro_batch_size=micro_batch_size),
    )


def step_samples(mode: str, first_step: int, num_steps: int, **layout: int) -> list[list[Any]]:
    """Returns, for each step, the samples of all data-parallel ranks: (number, tokens, targets)."""
    corpus, config = mixed_corpus(), mixed_config(mode, layout["micro_batch_size"])
    steps: list[list[Any]] = [[] for _ in range(num_steps)]
    for dp_rank in range(layout["dp_size"]):
        with BatchLoader(
            corpus,
            config,
            consumed_samples=12 * first_step,
            dp_rank=dp_rank,
            dp_size=layout["dp_size"],
            tp_size=layout["tp_size"],
            device_is_cuda=False,
        ) as batches:
            for step in steps:
                for batch in next(batches).micro_batches:
                    for number, inputs, targets in zip(
                        batch.sample_indices, batch.tokens, batch.targets, strict=True
                    ):
                        scored = targets != IGNORED_TARGET
                        step.append(
                            (int(number), inputs[scored].tolist(), targets[scored].tolist())
                        )
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
def test_a_step_has_the_same_samples_on_every_layout_and_after_every_resume(mode: str) -> None:
    """TP x DP x micro-batch splits, and cuts between any two steps, over several epochs."""
    expected = step_samples(mode, 0, 20, dp_size=1, tp_size=1, micro_batch_size=12)
    numbers = [number for step in expected for number, _, _ in step]
    assert numbers == list(range(240))
    for dp_size, tp_size, micro_batch_size in ((2, 1, 3), (1, 4, 4), (3, 2, 2), (6, 1, 1)):
        layout = {"dp_size": dp_size, "tp_size": tp_size, "micro_batch_size": micro_batch_size}
        for cut in (0, 1, 7, 19):
            assert step_samples(mode, cut, min(2, 20 - cut), **layout) == expected[cut : cut + 2]


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
def test_a_mixed_run_sees_each_row_of_a_source_once_an_epoch(mode: str) -> None:
    """Told apart by their targets; sources have epochs of their own."""
    steps = step_samples(mode, 0, 20, dp_size=1, tp_size=1, micro_batch_size=12)
    samples = [each for step in steps for each in step]
    sizes = rows_of_corpus(mixed_corpus(), mixed_config(mode, 12)).rows_of_sources
    order = SampleOrder((3.0, 1.0, 1.0), sizes, seed=1)
    sources, _ = make_schedule((3.0, 1.0, 1.0)).split(np.arange(240))
    for source, size in enumerate(sizes):
        mine = [str(targets) for number, _, targets in samples if sources[number] == source]
        assert len(mine) / size == pytest.approx(order.epochs(240)[source])
        epochs = [mine[first : first + size] for first in range(0, len(mine) - size + 1, size)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == sorted(set(mine)) for epoch in epochs)
