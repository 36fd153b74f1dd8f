"""Loss and bits per byte of held-out text against the dense reference, and the sample."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs import Config, parse_config
from data.token_file import Tokens
from parallel import Mesh, local_shards
from tests.distributed import ONE_RANK, Layout, distributed
from tests.reference import reference_logits
from tests.weights import full_tensors
from train import start
from training.evaluation import evaluate, generate_sample, sample_prompt, validation_set
from training.run_folder import RunFolder

TEXTS = [f"for i in range({n}):\n    print('é', i * {n})\n" * (1 + n % 5) for n in range(40)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A model with random float32 weights, and text of which a fifth is held out."""
    folder = tmp_path_factory.mktemp("evaluation")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return parse_config(
        [
            "config=gpt_debug",
            f"run.directory={folder / 'runs'}",
            "data.source=text",
            f"data.path={folder}",
            f"data.cache_directory={folder / 'cache'}",
            "data.vocab_size=310",
            "data.validation_fraction=0.2",
            "model.seq_length=13",
            "model.hidden_size=32",
            "train.precision=fp32",
            "evaluate.max_sequences=100000",
            "evaluate.sample_tokens=5",
            "evaluate.sample_prompt=for i in",
        ]
    )


def reference_score(
    weights: dict[str, Tensor], config: Config, file: Tokens, stride: int | None = None
) -> tuple[float, int]:
    """Nats and targets of all documents, window by window; see data/evaluation.py."""
    nats, num_targets, longest = 0.0, 0, config.model.seq_length
    for start_at, stop_at in itertools.pairwise(file.document_offsets):
        tokens = torch.tensor(file.span(start_at, stop_at - 1).astype("int64"))  # no eos
        num_scored = end = min(longest, len(tokens) - 1)
        while num_scored:
            inputs = tokens[max(0, end - longest) : end].unsqueeze(0)
            positions = torch.arange(inputs.shape[1]).unsqueeze(0)
            logits = reference_logits(weights, config.model, inputs, positions)[0, -num_scored:]
            targets = tokens[end + 1 - num_scored : end + 1]
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
            num_targets += num_scored
            num_scored = min(stride or longest, len(tokens) - 1 - end)
            end += num_scored
    return nats, num_targets


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
def test_scores_equal_the_reference(mesh: Mesh, config: Config) -> None:
    """Every held-out token except bos and eos is scored once, in its window."""
    with RunFolder(config, mesh) as folder:
        run, state = start(config, mesh, folder)
        result = evaluate(run, state, validation_set(run))
        weights = full_tensors(local_shards(run.model), mesh)
        file, tokenizer = run.corpus.validation, run.corpus.tokenizer
        nats, num_targets = reference_score(weights, config, file)
        num_bytes = sum(
            len(tokenizer.decode(file.span(start_at, stop_at).tolist()).encode())
            for start_at, stop_at in itertools.pairwise(file.document_offsets)
        )
    assert num_bytes < sum(len(text.encode()) for text in TEXTS)
    assert result.loss == pytest.approx(nats / num_targets, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / num_targets), rel=1e-4)
    assert result.sample is not None
    assert result.sample.startswith("for i in")


@distributed(Layout(tp=2))
def test_a_sample_repeats(mesh: Mesh, config: Config) -> None:
    """A sample depends on seed and step alone, and is the same on all ranks."""
    with RunFolder(config, mesh) as folder:
        run, state = start(config, mesh, folder)
        assert generate_sample(run, state) == generate_sample(run, state)


@distributed(ONE_RANK, Layout(dp=2))
def test_without_a_prompt_a_sample_begins_like_a_held_out_document(
    mesh: Mesh, config: Config
) -> None:
    """With evaluate.sample_prompt=null: its first 16 tokens, on every layout and at every step."""
    evaluation = dataclasses.replace(config.evaluate, sample_prompt=None)
    config = dataclasses.replace(config, evaluate=evaluation)
    with RunFolder(config, mesh) as folder:
        run, state = start(config, mesh, folder)
        file, tokenizer = run.corpus.validation, run.corpus.tokenizer
        begin, end = file.document_offsets[:2].tolist()
        text = tokenizer.decode(file.span(begin, end).tolist())
        prompt = sample_prompt(run.corpus, None)
        assert prompt == file.span(begin + 1, begin + 17).tolist()
        for step in (0, 5):
            sample = generate_sample(run, dataclasses.replace(state, step=step))
            assert sample is not None
            assert sample.startswith(tokenizer.decode(prompt))
            assert text.startswith(tokenizer.decode(prompt))
