"""One training step: forward, backward, clipping, update; and the number that fits a time limit."""

import logging
import math
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.loader import BatchLoader
from data.rows import MicroBatch
from parallel import (
    DropoutStream,
    clip_gradients,
    gather_json,
    initialise_parameters,
    local_gradients,
    run_pipeline,
    set_gradient_sync,
    set_reshard_after_backward,
    squared_norm,
    sum_on_host,
    sum_partial_gradients,
)
from training.divergence import skip_reason
from training.optimizer import apply_update, learning_rate, reset_optimizer
from training.signals import StopSignals
from training.state import Run, RunState, StepResult, training_batches

logger = logging.getLogger("microtron")

_UNSTEADY_STEPS, _MEASURED_STEPS = 3, 7  # the first compile kernels and allocate memory


def train_step(
    run: Run, state: RunState, batches: BatchLoader, signals: StopSignals | None = None
) -> StepResult:
    """Update the weights from the next global batch.

    The loss is the sum over the target tokens of all micro-batches and dp ranks, divided by their
    number. That number is known before the first backward, so gradients are plain sums. The host
    waits once, after the last backward, for loss, gradient norm and signals of all ranks.
    """
    started_at = time.perf_counter()
    config, mesh = run.config, run.mesh
    batch = next(batches)
    num_targets = batch.num_targets or math.nan  # without targets, the update is skipped
    losses = forward_backward(run, state, batch.micro_batches, num_targets)
    gradients = local_gradients(run.model)
    sum_partial_gradients(gradients, mesh)

    # tp ranks have the same losses, and only the last stage has any.
    counts = float(mesh.tp.rank == 0 and mesh.is_last_stage)
    values = torch.cat([losses * counts, squared_norm(gradients, mesh).view(1)])
    flags = [batch.sum_of_lengths * counts, *(signals.flags() if signals else StopSignals.NONE)]
    cross_entropy, log_z_squared, square, lengths, *flags = sum_on_host(mesh, values, flags)
    # Rounded to float32, so that a pipeline's order of summation does not show.
    loss, grad_norm = cross_entropy / num_targets, float(np.float32(math.sqrt(square)))
    rate = learning_rate(state.step, config)
    why_skipped = skip_reason(loss, grad_norm, state, config.train)
    if why_skipped is None:
        if config.optimizer.clip_grad > 0:
            clip_gradients(gradients, grad_norm, config.optimizer.clip_grad)
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
    run: Run, state: RunState, micro_batches: Sequence[MicroBatch], num_targets: float
) -> Tensor:
    """Accumulate gradients; return the sums of cross-entropy and squared log z, `[2]`.

    The sums are 0 except on the last stage of a pipeline.
    """
    config, mesh, model = run.config, run.mesh, run.model
    losses = torch.zeros(2, dtype=torch.float64, device=mesh.device)

    def forward(number: int, chunk: int, x: Tensor | None) -> Tensor:
        micro_batch = micro_batches[number]
        first_sample = int(micro_batch.sample_indices[0])
        micro_batch = micro_batch.to(mesh.device)
        keys = micro_batch.dropout_keys
        output = model(
            **micro_batch.inputs(),
            stream=DropoutStream(config.run.seed, state.step, first_sample, keys),
            z_loss_coeff=config.train.z_loss_coeff,
            chunk=chunk,
            x=x,
        )
        if isinstance(output, Tensor):
            return output  # activations for the next stage
        losses.add_(torch.stack([output.cross_entropy, output.log_z_squared]))
        return output.objective / num_targets

    def before_backward(number: int, chunk: int) -> None:
        is_last = number == len(micro_batches) - 1
        # The last backward of one chunk may come long before that of another.
        modules = model.modules_of_chunk(chunk) if is_last and mesh.num_chunks > 1 else None
        sync = is_last or config.parallel.gradient_sync == "micro_batch"
        set_gradient_sync(model, sync, modules, is_last=is_last)
        reshards = is_last or config.parallel.reshard_after_forward
        set_reshard_after_backward(model, reshards and mesh.pp.size == 1)

    shapes = [model.activation_shape(micro_batch.tokens.t()) for micro_batch in micro_batches]
    run_pipeline(mesh, shapes, model.dtype, forward, before_backward)
    return losses


def steps_that_fit(run: Run, limit_s: float) -> int:
    """Measure a few steps, and return how many fit in `limit_s` seconds, those included.

    All ranks return the number of rank 0. Resets weights and optimizer, so that the run equals one
    with this `train.train_steps`.
    """
    began_at, state = time.perf_counter(), RunState(wandb_id="")
    with training_batches(run, state) as batches:
        steps = [train_step(run, state, batches) for _ in range(_UNSTEADY_STEPS + _MEASURED_STEPS)]
    initialise_parameters(run.model, run.config.run.seed, run.mesh)
    reset_optimizer(run.optimizer)
    step_s = statistics.median(step.elapsed_s for step in steps[_UNSTEADY_STEPS:])
    left_s = limit_s - (time.perf_counter() - began_at)
    number, step_s = gather_json(run.mesh, [max(1, int(left_s / step_s)), step_s])[0]
    message = "train.time_limit_s=%g: a step takes %.3g s, so the run has up to %d steps"
    logger.info(message, limit_s, step_s, number)
    return number
