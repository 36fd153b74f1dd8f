"""Training batches: the same samples on every layout, errors, and the end of the thread."""

import dataclasses
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from configs import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from configs.schema import WeightedSource
from data import Corpus, TokenFile
from data.loader import BatchLoader, StepBatch
from data.sampler import SampleOrder
from data.token_file import JoinedTokens
from ops.dropout import dropout_keys
from tests.data_corpora import corpus_of_lengths, token_file

NUM_LAYERS = 2
LENGTHS = [40, 3, 2, 90, 11, 1, 25, 64, 7, 130]
Sample = tuple[int, tuple[int, ...], tuple[int, ...]]


def mixed_corpus() -> Corpus:
    """Return three sources with weights 2, 1, 1; tokens tell the source and the position."""
    files = [token_file(lengths) for lengths in (LENGTHS, [33, 5, 70, 6, 6], [160])]
    parts = [
        dataclasses.replace(file, tokens=file.tokens + 10_000 * number)
        for number, file in enumerate(files)
    ]
    alone = corpus_of_lengths([2])
    return dataclasses.replace(alone, train=JoinedTokens(parts), weights=(2.0, 1.0, 1.0))


def loader(corpus: Corpus, **changes: Any) -> BatchLoader:
    """Return a loader of one rank with changed settings."""
    settings: dict[str, Any] = {
        "seed": 1,
        "seq_length": 8,
        "hidden_dropout": 0.0,
        "mode": "pad",
        "inter_document_masking": False,
        "global_batch_size": 12,
        "micro_batch_size": 12,
        "consumed_samples": 0,
        "first_step": 0,
        "dp_rank": 0,
        "dp_size": 1,
        "tp_size": 1,
        "device_is_cuda": False,
        **changes,
    }
    mode = settings.pop("mode")
    config = Config(
        run=RunConfig(seed=settings.pop("seed")),
        model=ModelConfig(
            num_layers=NUM_LAYERS,
            seq_length=settings.pop("seq_length"),
            hidden_dropout=settings.pop("hidden_dropout"),
        ),
        data=DataConfig(
            sources=tuple(WeightedSource(weight=weight) for weight in corpus.weights),
            sequence_mode="pad" if mode == "pad" else "pack",
            packing="best_fit" if mode == "best_fit" else "stream",
            inter_document_masking=settings.pop("inter_document_masking"),
        ),
        train=TrainConfig(
            global_batch_size=settings.pop("global_batch_size"),
            micro_batch_size=settings.pop("micro_batch_size"),
        ),
    )
    return BatchLoader(corpus, config, **settings)


def steps(corpus: Corpus, num_steps: int, **changes: Any) -> list[StepBatch]:
    """Return the first steps of a loader."""
    with loader(corpus, **changes) as batches:
        return [next(batches) for _ in range(num_steps)]


def samples(batches: list[StepBatch]) -> list[Sample]:
    """Return (sample index, scored inputs, scored targets) of all rows in order."""
    rows: list[Sample] = []
    for batch in batches:
        for micro in batch.micro_batches:
            for row, index in enumerate(micro.sample_indices.tolist()):
                scored = micro.targets[row] != -100
                tokens = tuple(micro.tokens[row][scored].tolist())
                rows.append((index, tokens, tuple(micro.targets[row][scored].tolist())))
    return rows


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
@pytest.mark.parametrize("is_mixture", [False, True])
@pytest.mark.parametrize("dp_sizes", [(3,), pytest.param((1, 2, 4, 6), marks=pytest.mark.slow)])
def test_samples_do_not_depend_on_the_layout(
    mode: str, is_mixture: bool, dp_sizes: tuple[int, ...]
) -> None:
    """dp, tp, micro-batch size and the step of a resume change no sample of any step.

    Ranks take contiguous shares; in mode pad, equally many rows of similar length.
    """
    corpus = mixed_corpus() if is_mixture else corpus_of_lengths(LENGTHS)
    expected = [samples([step]) for step in steps(corpus, 9, mode=mode)]
    assert [row[0] for step in expected for row in step] == list(range(9 * 12))
    for dp_size in dp_sizes:
        for micro_batch_size in {1, 2, 12 // dp_size, 5}:
            for first_step in (0, 4, 7):
                found: list[list[Sample]] = [[] for _ in range(first_step, 9)]
                num_micro_batches = set()
                for dp_rank in range(dp_size):
                    share = steps(
                        corpus,
                        9 - first_step,
                        mode=mode,
                        micro_batch_size=micro_batch_size,
                        consumed_samples=12 * first_step,
                        dp_rank=dp_rank,
                        dp_size=dp_size,
                        tp_size=dp_size,
                    )
                    for number, step in enumerate(share):
                        found[number] += samples([step])
                        num_micro_batches.add(len(step.micro_batches))
                if mode == "pad":
                    found = [sorted(step) for step in found]
                assert found == expected[first_step:]
                assert num_micro_batches == {-(-12 // dp_size // micro_batch_size)}


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
def test_each_row_comes_once_per_epoch(mode: str) -> None:
    """This holds although an epoch is no whole number of steps."""
    corpus = corpus_of_lengths(LENGTHS)
    rows = sorted(samples(steps(corpus, 30, mode=mode, global_batch_size=7)))
    num_rows = len({row[1:] for row in rows})
    for start in range(0, len(rows) - num_rows + 1, num_rows):
        assert len({row[1:] for row in rows[start : start + num_rows]}) == num_rows


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
def test_rows_of_a_mixture_are_those_of_its_sources(mode: str) -> None:
    """No row mixes sources, weights set their shares, and each source has its own epochs."""
    corpus = mixed_corpus()
    mixture = samples(steps(corpus, 20, mode=mode))
    sizes, num_epochs = [], []
    for source, part in enumerate(corpus.train.parts):
        mine = [row[1:] for row in mixture if row[1][0] // 10_000 == source]
        assert len(mine) == pytest.approx(20 * 12 * corpus.weights[source] / 4, abs=2)
        of_part = dataclasses.replace(corpus, train=part, weights=(1.0,))
        rows = {row[1:] for row in samples(steps(of_part, 10, mode=mode))}
        epochs = [mine[first : first + len(rows)] for first in range(0, len(mine), len(rows))]
        assert all(sorted(epoch) == sorted(rows) for epoch in epochs[:-1])
        assert len(epochs) > 2
        assert {*epochs[-1]} <= rows
        sizes.append(len(rows))
        num_epochs.append(len(mine) / len(rows))
    assert SampleOrder(corpus.weights, sizes, seed=1).epochs(20 * 12) == num_epochs


def test_resume_with_another_batch_size_keeps_the_order() -> None:
    """The number of consumed samples is the only state."""
    corpus = corpus_of_lengths(LENGTHS)
    straight = samples(steps(corpus, 4))
    resumed = samples(steps(corpus, 3, consumed_samples=24, global_batch_size=8))
    assert resumed == straight[24:48]


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
@pytest.mark.parametrize("masked", [False, True])
def test_num_targets_counts_the_targets_of_all_ranks(mode: str, masked: bool) -> None:
    """num_targets is that of the global batch, sum_of_lengths that of this rank's micro-batches."""
    of_ranks = [
        steps(
            mixed_corpus(),
            3,
            mode=mode,
            inter_document_masking=masked and mode != "pad",
            micro_batch_size=4,
            dp_rank=dp_rank,
            dp_size=2,
        )
        for dp_rank in range(2)
    ]
    for shares in zip(*of_ranks, strict=True):
        total = 0
        for share in shares:
            counts = [int((micro.targets != -100).sum()) for micro in share.micro_batches]
            assert [micro.num_targets for micro in share.micro_batches] == counts
            lengths = [micro.sum_of_lengths for micro in share.micro_batches]
            assert share.sum_of_lengths == sum(lengths)
            total += sum(counts)
        assert [share.num_targets for share in shares] == [total, total]


def test_dropout_keys_are_those_of_the_samples() -> None:
    """They depend on seed, step and global sample, not on the layout or the step of a resume."""
    corpus = corpus_of_lengths(LENGTHS)
    (micro,) = steps(corpus, 3, hidden_dropout=0.1, mode="stream")[2].micro_batches
    assert torch.equal(micro.dropout_keys, dropout_keys(1, 2, range(24, 36), NUM_LAYERS))
    resumed = {
        "mode": "stream",
        "first_step": 2,
        "consumed_samples": 24,
        "dp_rank": 1,
        "dp_size": 2,
    }
    (share,) = steps(corpus, 1, hidden_dropout=0.1, **resumed)[0].micro_batches
    assert torch.equal(share.dropout_keys, micro.dropout_keys[..., 6:])
    assert steps(corpus, 1)[0].micro_batches[0].dropout_keys is None


@pytest.mark.parametrize("mode", ["stream", "best_fit", "pad"])
@pytest.mark.parametrize("seq_length", [5, 8, 13])
def test_every_micro_batch_divides_by_tp(mode: str, seq_length: int) -> None:
    """Any seq_length works with any tp; packed rows are padded to a multiple of tp."""
    corpus = corpus_of_lengths(LENGTHS)
    changes = {"seq_length": seq_length, "mode": mode, "micro_batch_size": 3}
    for tp_size in (1, 2, 3, 4):
        for step in steps(corpus, 3, tp_size=tp_size, **changes):
            widths = {micro.tokens.shape[1] for micro in step.micro_batches}
            assert all(width % tp_size == 0 for width in widths)
            assert mode != "stream" or widths == {-(-seq_length // tp_size) * tp_size}
            for micro in step.micro_batches:
                assert bool((micro.positions[micro.targets == -100] == 0).all())
                assert int(micro.positions.max()) < seq_length


def test_an_error_in_the_thread_is_raised_at_next() -> None:
    """After the error the iterator has ended, and nothing hangs."""
    corpus = corpus_of_lengths([50])
    # The offsets go beyond the tokens, so rows past the end cannot be read.
    broken = TokenFile(corpus.train.tokens[:20], corpus.train.document_offsets, np.array([1]))
    broken_corpus = Corpus(corpus.tokenizer, corpus.tokenizer_path, broken, broken, "", {})
    with loader(broken_corpus, global_batch_size=6, micro_batch_size=6) as batches:
        with pytest.raises(ValueError, match="could not broadcast"):
            list(batches)
        assert next(batches, None) is None


def test_close_ends_the_thread_promptly() -> None:
    """A loader with prefetched batches ends within seconds and leaves no thread."""
    before = threading.active_count()
    with loader(corpus_of_lengths(LENGTHS)) as batches:
        next(batches)
        assert threading.active_count() == before + 1
        started_at = time.perf_counter()
    assert time.perf_counter() - started_at < 10.0
    assert threading.active_count() == before
    assert next(batches, None) is None


def test_bad_batch_size_and_empty_source_are_named() -> None:
    """The messages contain keys and values."""
    with pytest.raises(ValueError, match=r"train\.global_batch_size=12 .* data-parallel size 5"):
        loader(corpus_of_lengths(LENGTHS), dp_size=5)
    nothing = r"data\.sources\[0\]\.source=python_stdlib give no row of model\.seq_length=64"
    with pytest.raises(ValueError, match=nothing):
        loader(corpus_of_lengths([20]), mode="stream", seq_length=64)


def test_tensors_are_not_shared_between_steps() -> None:
    """Changing a step in place does not change another."""
    first, second = steps(corpus_of_lengths(LENGTHS), 2)
    kept = second.micro_batches[0].tokens.clone()
    first.micro_batches[0].tokens.zero_()
    assert torch.equal(kept, second.micro_batches[0].tokens)
