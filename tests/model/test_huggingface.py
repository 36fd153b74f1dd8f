"""Models equal those of Hugging Face: logits, losses and every gradient, on every layout.

So does training: twenty steps of `train_step` against a loop of transformers and torch.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import Config, DataConfig, OptimizerConfig, TrainConfig
from data.loader import StepBatch
from data.rows import MicroBatch
from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, distributed
from tests.huggingface import (
    CASES,
    LAYOUTS,
    LENGTH,
    VOCAB,
    losses_of,
    measure,
    our_model,
    their_model,
    write_case,
)
from training.optimizer import build_optimizer
from training.state import Run, RunState
from training.step import train_step


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case's file."""
    folder = tmp_path_factory.mktemp("huggingface")
    paths = {name: folder / f"{number}" for number, name in enumerate(CASES)}
    for name, path in paths.items():
        write_case(name, path)
    return paths


@pytest.mark.parametrize("name", CASES)
@distributed(*LAYOUTS)
def test_logits_and_gradients_equal_transformers(
    mesh: Mesh, name: str, files: dict[str, Path]
) -> None:
    """Ours in float32 equals transformers in float64 up to rounding."""
    difference = measure(mesh, name, files[name])
    assert difference.loss < 2e-6, difference
    assert difference.logits < 2e-6, difference
    assert difference.gradients < 2e-5, difference


# --- twenty steps ---

STEPS, ROWS, WARMUP_STEPS = 20, 4, 4
LR, MIN_LR, WEIGHT_DECAY, LARGEST_NORM = 1e-2, 1e-3, 0.1, 1.0


def rows_of_step(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and next-token targets `[4, 12]`; rows differ in length, padding is ignored."""
    generator = torch.Generator().manual_seed(100 + step)
    # Each token is a function of the previous one, so that there is something to learn.
    tokens = torch.randint(VOCAB, (ROWS, 1), generator=generator)
    for _ in range(LENGTH):
        tokens = torch.cat([tokens, (3 * tokens[:, -1:] + 1) % VOCAB], dim=1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    lengths = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=generator)
    return inputs, targets.masked_fill(torch.arange(LENGTH) >= lengths, -100)


def their_curve(name: str) -> list[dict[str, float]]:
    """Loss and gradient norm per step of transformers with torch's AdamW, clipping and a cosine."""
    theirs = their_model(CASES[name])
    parameters = list(theirs.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    curve = []
    for step in range(STEPS):
        tokens, targets = rows_of_step(step)
        loss = losses_of(theirs(tokens).logits, targets)[0] / (targets >= 0).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
        done = (step - WARMUP_STEPS) / (STEPS - 1 - WARMUP_STEPS)
        cosine = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR * (step + 1) / WARMUP_STEPS if step < WARMUP_STEPS else cosine
        optimizer.step()
        optimizer.zero_grad()
        curve.append({"loss": loss.item(), "grad_norm": norm.item()})
    return curve


def step_batch(step: int, mesh: Mesh) -> StepBatch:
    """This data-parallel rank's rows, in two micro-batches."""
    num_targets = int((rows_of_step(step)[1] >= 0).sum())
    tokens, targets = (rows.chunk(mesh.dp.size)[mesh.dp.rank] for rows in rows_of_step(step))
    whole_rows = [
        MicroBatch(
            tokens=part,
            targets=part_targets,
            positions=torch.arange(LENGTH).repeat(len(part), 1),
            sample_indices=torch.arange(len(part)),
            num_targets=int((part_targets >= 0).sum()),
        )
        for part, part_targets in zip(tokens.chunk(2), targets.chunk(2), strict=True)
    ]
    micro_batches = [rows.of_cp_rank(mesh.cp.rank, mesh.cp.size) for rows in whole_rows]
    return StepBatch(micro_batches, num_targets, sum(rows.sum_of_lengths for rows in whole_rows))


@pytest.fixture(scope="module", params=["GPT-2", "Llama, 2 query groups"])
def curve(request: pytest.FixtureRequest) -> tuple[str, list[dict[str, float]]]:
    """A case's name and its curve."""
    return request.param, their_curve(request.param)


@pytest.mark.slow
@distributed(
    ONE_RANK,
    Layout(tp=2),
    Layout(tp=2, sp=False),
    Layout(tp=4),
    Layout(tp=2, dp=2),
    Layout(cp=2),
    Layout(cp=2, cp_comm_type="p2p"),
)
def test_twenty_steps_equal_a_loop_of_transformers(
    mesh: Mesh, curve: tuple[str, list[dict[str, float]]], files: dict[str, Path]
) -> None:
    """With padding, micro-batches, clipping, decay and a schedule, within 1e-5 of float64."""
    name, expected = curve
    config = Config(
        model=CASES[name].config,
        data=DataConfig(vocab_size=VOCAB),
        train=TrainConfig(train_steps=STEPS, precision="fp32"),
        optimizer=OptimizerConfig(
            lr=LR,
            min_lr=MIN_LR,
            lr_warmup_steps=WARMUP_STEPS,
            weight_decay=WEIGHT_DECAY,
            clip_grad=LARGEST_NORM,
        ),
    )
    model = our_model(CASES[name], mesh, load_file(files[name]))
    unused: Any = None
    run = Run(config, mesh, unused, unused, model, build_optimizer(model, config.optimizer))
    state = RunState(wandb_id="")
    batches: Any = iter([step_batch(step, mesh) for step in range(STEPS)])
    for their_step in expected:
        result = train_step(run, state, batches)
        state = state.advance(result, ROWS)
        assert result.loss == pytest.approx(their_step["loss"], rel=1e-5), state.step
        assert result.grad_norm == pytest.approx(their_step["grad_norm"], rel=1e-4), state.step
    assert sum(step["grad_norm"] > LARGEST_NORM for step in expected) > 3
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]
