"""One training step: forward, backward, clipping, AdamW."""

import time

import torch

from data import BatchLoader
from parallel import (
    DropoutStream,
    clip_gradients,
    move_to,
    set_gradient_sync,
    sum_over,
    sum_partial_gradients,
)
from training.divergence import skip_reason
from training.optimizer import apply_update, learning_rate
from training.state import Run, RunState, StepResult


def train_step(run: Run, state: RunState, batches: BatchLoader) -> StepResult:
    """Update the weights from the next global batch.

    The loss is the sum over the target tokens of all micro-batches and dp ranks, divided by their
    number. That number is known before the first backward, so gradients are plain sums.
    """
    started_at = time.perf_counter()
    config, mesh, model = run.config, run.mesh, run.model
    batch = next(batches)
    num_targets = sum_over(mesh.dp, move_to(torch.tensor(batch.num_targets), mesh.device))
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        is_last = number == len(batch.micro_batches)
        set_gradient_sync(model, is_last or config.parallel.gradient_sync == "micro_batch")
        samples = tuple(micro_batch.sample_indices.tolist())
        losses = model(
            **micro_batch.inputs(mesh.device),
            stream=DropoutStream(config.run.seed, state.step, samples),
            z_loss_coeff=config.train.z_loss_coeff,
        )
        (losses.objective / num_targets).backward()
        sums[:2] += torch.stack([losses.cross_entropy, losses.log_z_squared]).detach()
        sums[2] += micro_batch.sum_of_lengths
    sum_partial_gradients(model, mesh)
    grad_norm = move_to(clip_gradients(model, config.optimizer.clip_grad, mesh), "cpu").item()
    means = move_to(sum_over(mesh.dp, sums) / num_targets, "cpu").tolist()
    loss, log_z_squared, row_length = means
    rate = learning_rate(state.step, config)
    why_skipped = skip_reason(loss, grad_norm, state, config.train, mesh)
    if why_skipped is None:
        apply_update(run.optimizer, rate)
    else:
        run.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        z_loss=config.train.z_loss_coeff * log_z_squared,
        grad_norm=grad_norm,
        learning_rate=rate,
        num_targets=int(move_to(num_targets, "cpu")),
        mean_row_length=row_length,
        elapsed_s=time.perf_counter() - started_at,
        why_skipped=why_skipped,
    )
