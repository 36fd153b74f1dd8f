"""Short training runs for the tests of the programs that use a run."""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import Config, read_config
from configs.program_settings import run_config
from data import TokenFile, Tokenizer, load_tokenizer
from evaluate import Settings as EvaluateSettings
from evaluate import text_to_score
from model import Sampling
from model.generation.sampling import sample_tokens, uniform_draw
from parallel import Mesh
from tests.distributed import Layout
from tests.fork_server import Program
from tests.lines import ROOT
from tests.reference import reference_logits
from tests.runs import rows, settings, train_on
from training.evaluation import eval_batches, score
from training.inference import load_for_inference

# With two groups, each group is shared by two of four ranks.
FAMILIES = {
    "gpt": (),
    "llama": ("config=llama_debug", "model.qk_layernorm=true", "model.num_query_groups=2"),
}


def train_family(corpus: Path, directory: Path, family: str) -> Path:
    """Train at TP=2 x DP=2 and save steps 3 and 6; returns the run folder."""
    overrides = ("run.name=test", "checkpoint.save_interval=3", *FAMILIES[family])
    train_on(Layout(tp=2, dp=2), settings(corpus, directory, *overrides))
    return directory / "test"


def assert_scored_like_training(mesh: Mesh, run: Path) -> None:
    """Compare what evaluate.py computes on the held-out text with the last evaluation of a run."""
    config = run_config(str(run))
    trained = load_for_inference(config, run, mesh, None)
    corpus, most = text_to_score(trained, EvaluateSettings(str(run)))
    found = score(trained.model, eval_batches(corpus, config, mesh, max_sequences=most))
    expected = [row for row in rows(run.parent) if "eval/loss" in row][-1]
    assert found.loss == pytest.approx(expected["eval/loss"], rel=2e-6)
    assert found.bits_per_byte == pytest.approx(expected["eval/bits_per_byte"], rel=2e-6)


class Dense:
    """The dense reference of a run: its full weights, read from the files, in float64."""

    def __init__(self, run: Path, step: int = 6) -> None:
        folder = run / "checkpoints" / f"step_{step:08}"
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {name: load_file(folder / name) for name in manifest["files"]}
        self.config: Config = read_config(run / "config.yaml")
        self.tokenizer: Tokenizer = load_tokenizer(run / "tokenizer.model")
        self.weights: dict[str, Tensor] = {}
        for name, entry in manifest["tensors"].items():
            if name.startswith("parameters."):
                full = torch.full(entry["shape"], float("nan"), dtype=torch.float64)
                for shard in entry["shards"]:
                    sides = zip(shard["offsets"], shard["shape"], strict=True)
                    place = tuple(slice(start, start + size) for start, size in sides)
                    full[place] = files[shard["file"]][name].double()
                self.weights[name.removeprefix("parameters.")] = full

    def file(self, texts: list[str]) -> TokenFile:
        """Texts as documents: bos, their tokens, eos."""
        tokenizer = self.tokenizer
        documents = [
            [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts
        ]
        return TokenFile(
            np.concatenate(documents).astype(np.uint16),
            np.cumsum([0, *map(len, documents)]),
            np.array([len(text.encode()) for text in texts]),
        )

    def continuation(
        self, prompt: str, num_tokens: int, sampling: Sampling, sample: int = 0
    ) -> str:
        """Continue bos and the prompt up to the end of the document, without a cache."""
        prompt_ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        tokens = list(prompt_ids)
        for number in range(num_tokens):
            context = torch.tensor([tokens[-self.config.model.seq_length :]])
            positions = torch.arange(context.shape[1]).unsqueeze(0)
            logits = reference_logits(self.weights, self.config.model, context, positions)[:, -1]
            logits = logits[:, : self.tokenizer.vocab_size]
            tokens.append(
                int(sample_tokens(logits, sampling, [uniform_draw(sampling, sample, number)]))
            )
            if tokens[-1] == self.tokenizer.eos_id:
                break
        return self.tokenizer.decode(tokens[len(prompt_ids) :])


def start_program(ranks: int, program: str, *arguments: str, given: str = "") -> tuple[int, bytes]:
    """Run a program of the project; its exit code and what it has written to stdout alone."""
    with tempfile.NamedTemporaryFile("r") as errors:
        process = Program(
            [str(ROOT / program), *arguments],
            given.encode(),
            environment={**os.environ, "OMP_NUM_THREADS": "1"},
            torchrun=["--nproc-per-node", str(ranks)] if ranks > 1 else None,
            stderr_file=errors.name,
        )
        output, _ = process.communicate(timeout=300)
        sys.stderr.write(errors.read())
    assert process.returncode is not None
    return process.returncode, output.encode()
