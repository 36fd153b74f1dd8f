"""One training step: forward, backward, clipping, AdamW."""

import math
import time

import torch
from torch import Tensor

from data import BatchLoader, MicroBatch
from parallel import (
    DropoutStream,
    clip_gradients,
    set_gradient_sync,
    set_reshard_after_backward,
    squared_norm,
    sum_on_host,
    sum_partial_gradients,
)
from training.divergence import skip_reason
from training.optimizer import apply_update, learning_rate
from training.signals import StopSignals
from training.state import Run, RunState, StepResult


def train_step(
    run: Run, state: RunState, batches: BatchLoader, signals: StopSignals | None = None
) -> StepResult:
    """Update the weights from the next global batch.

    The loss is the sum over the target tokens of all micro-batches and dp ranks, divided by their
    number. That number is known before the first backward, so gradients are plain sums.

    The host waits for the device and for the other ranks once, after the last backward, for all
    that decides the update: loss, gradient norm and signals.
    """
    started_at = time.perf_counter()
    config, mesh, model = run.config, run.mesh, run.model
    batch = next(batches)
    num_targets = batch.num_targets or math.nan  # without targets, the update is skipped
    losses = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        is_last = number == len(batch.micro_batches)
        set_gradient_sync(model, is_last or config.parallel.gradient_sync == "micro_batch")
        set_reshard_after_backward(model, is_last or config.parallel.reshard_after_forward)
        losses += forward_backward(run, state, micro_batch, num_targets)
    sum_partial_gradients(model, mesh)

    counts = float(mesh.tp.rank == 0)  # all tp ranks have the losses of the same samples
    values = torch.cat([losses * counts, squared_norm(model, mesh).view(1)])
    flags = [batch.sum_of_lengths * counts, *(signals.flags() if signals else StopSignals.NONE)]
    cross_entropy, log_z_squared, square, lengths, *flags = sum_on_host(mesh, values, flags)
    loss, grad_norm = cross_entropy / num_targets, math.sqrt(square)
    rate = learning_rate(state.step, config)
    why_skipped = skip_reason(loss, grad_norm, state, config.train)
    if why_skipped is None:
        if config.optimizer.clip_grad > 0:
            clip_gradients(model, grad_norm, config.optimizer.clip_grad)
        apply_update(run.optimizer, rate)
    else:
        run.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        z_loss=config.train.z_loss_coeff * log_z_squared / num_targets,
        grad_norm=grad_norm,
        learning_rate=rate,
        num_targets=batch.num_targets,
        mean_row_length=lengths / num_targets,
        elapsed_s=time.perf_counter() - started_at,
        why_skipped=why_skipped,
        stop=signals.agreed(flags) if signals else None,
    )


def forward_backward(
    run: Run, state: RunState, micro_batch: MicroBatch, num_targets: float
) -> Tensor:
    """Add the gradients of one micro-batch; returns its cross-entropy and squared log z, `[2]`."""
    train, seed = run.config.train, run.config.run.seed
    first_sample = int(micro_batch.sample_indices[0])
    micro_batch = micro_batch.to(run.mesh.device)
    losses = run.model(
        **micro_batch.inputs(),
        stream=DropoutStream(seed, state.step, first_sample, micro_batch.dropout_keys),
        z_loss_coeff=train.z_loss_coeff,
    )
    (losses.objective / num_targets).backward()
    return torch.stack([losses.cross_entropy, losses.log_z_squared])
