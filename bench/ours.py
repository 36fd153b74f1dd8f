"""Our own trainer on the workload, through train.py's `train_step`.

    python -m bench.ours [--layout=dp2 --steps=3 ...] [section.key=value ...]

Model, optimizer and loader are the real ones. The corpus consists of random tokens, as on the other
sides, and nothing is saved or logged. Settings after the flags apply to our side only, to compare
variants of it.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.activations import saved_per_layer
from bench.timing import report, time_steps
from bench.workload import (
    BETAS,
    CLIP_GRAD,
    EPS,
    LR,
    SEED,
    WEIGHT_DECAY,
    Arguments,
    Workload,
    parse,
)
from configs import Config, parse_config
from data import Corpus, SentencePieceTokenizer, TokenFile
from data.corpus.tokenizer_training import train_tokenizer
from data.loader import BatchLoader
from model import build_model, flops_per_token, num_parameters
from parallel import DropoutStream, Mesh, close_mesh
from training.hardware import choose_precision, set_up_allocator
from training.optimizer import build_optimizer
from training.run_folder import RunFolder
from training.state import Run, RunState, mesh_from_config, training_batches
from training.step import train_step

_CONFIG = Path(__file__).with_name("bench_gpt.yaml")
_ROWS = 64  # of random tokens; the number of epochs does not matter
_PIECES = 262  # of a tokenizer that nothing is encoded with: the loader asks it for eos


def settings(workload: Workload) -> list[str]:
    """Return the workload as our settings, with everything but training switched off."""
    return [
        f"config={_CONFIG}",
        f"run.seed={SEED}",
        f"model.num_layers={workload.num_layers}",
        f"model.hidden_size={workload.hidden_size}",
        f"model.num_attention_heads={workload.num_attention_heads}",
        f"model.ffn_hidden_size={workload.ffn_hidden_size}",
        f"model.seq_length={workload.seq_length}",
        f"model.hidden_dropout={workload.dropout}",
        f"model.attention_dropout={workload.attention_dropout}",
        f"data.vocab_size={workload.vocab_size}",
        f"parallel.tensor_model_parallel_size={workload.tp}",
        f"parallel.pipeline_model_parallel_size={workload.size('pp')}",
        f"parallel.context_parallel_size={workload.size('cp')}",
        f"parallel.sequence_parallel={str(workload.sequence_parallel).lower()}",
        f"train.global_batch_size={workload.global_batch_size}",
        f"train.micro_batch_size={workload.micro_batch}",
        f"train.precision={workload.precision}",
        f"optimizer.lr={LR}",
        f"optimizer.min_lr={LR}",
        f"optimizer.adam_beta1={BETAS[0]}",
        f"optimizer.adam_beta2={BETAS[1]}",
        f"optimizer.adam_eps={EPS}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"optimizer.clip_grad={CLIP_GRAD}",
    ]


def corpus_of(config: Config, text: str = "") -> Corpus:
    """One document of the bytes of a file, or of random tokens, the same on every rank."""
    model = train_tokenizer(["ab"], _PIECES)
    if text:
        tokens = np.fromfile(text, np.uint8).astype(np.int64)
    else:
        size = _ROWS * config.model.seq_length + 1
        tokens = np.random.default_rng(SEED).integers(0, config.data.padded_vocab_size, size)
    length = len(tokens)
    document = TokenFile(
        tokens.astype(np.uint32),
        np.array([0, length], dtype=np.int64),
        np.array([length], dtype=np.int64),
        config.data.padded_vocab_size,
    )
    tokenizer = SentencePieceTokenizer(model, "the benchmark")
    return Corpus(tokenizer, _CONFIG, document, document, "random", {})


def build_run(config: Config, mesh: Mesh, folder: RunFolder, text: str = "") -> Run:
    """Create what train.py's `start` creates, from random tokens or the bytes of a file."""
    set_up_allocator(mesh, num_parameters(config.model, config.data.padded_vocab_size))
    model = build_model(config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    return Run(config, mesh, folder, corpus_of(config, text), model, optimizer)


def stepper(run: Run, batches: BatchLoader) -> Callable[[int], float]:
    """train.py's loop, a step at a time; returns the loss of each."""
    state = RunState(wandb_id="none")

    def step(_: int) -> float:
        nonlocal state
        result = train_step(run, state, batches)
        state = state.advance(result, run.config.train.global_batch_size)
        return result.loss

    return step


def time_training(config: Config, mesh: Mesh, arguments: Arguments) -> dict[str, Any]:
    """Seconds of each step, and what else `time_steps` finds."""
    run = build_run(config, mesh, RunFolder(config, mesh), arguments.workload.text)
    with training_batches(run, RunState(wandb_id="none")) as batches:
        measured = time_steps(stepper(run, batches), arguments)
    return {
        "num_parameters": num_parameters(config.model, config.data.padded_vocab_size),
        "flops_per_token": flops_per_token(config.model, config.data.padded_vocab_size),
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        **measured,
    }


def count_activations(config: Config, mesh: Mesh, workload: Workload) -> dict[str, Any]:
    """Measure what one layer saves for backward."""

    def make(num_layers: int) -> tuple[nn.Module, Callable[[], Tensor]]:
        shape = dataclasses.replace(config.model, num_layers=num_layers)
        smaller = dataclasses.replace(config, model=shape)
        run = build_run(smaller, mesh, RunFolder(smaller, mesh))
        with training_batches(run, RunState(wandb_id="none")) as batches:
            micro_batch = next(batches).micro_batches[0]
        masks = DropoutStream(SEED, 0, 0, micro_batch.dropout_keys)
        inputs = micro_batch.to(mesh.device).inputs()
        return run.model, lambda: run.model(**inputs, stream=masks).objective

    return saved_per_layer(make, workload)


def main() -> int:
    """One side of the benchmark."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(
            [
                *settings(arguments.workload),
                f"run.directory={folder}",
                "logging.wandb=disabled",
                *arguments.overrides,
            ]
        )
        mesh = mesh_from_config(config)
        choose_precision(config, mesh)
        torch.manual_seed(SEED)
        if arguments.measure == "activations":
            report(count_activations(config, mesh, arguments.workload))
        else:
            report(time_training(config, mesh, arguments))
        close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
