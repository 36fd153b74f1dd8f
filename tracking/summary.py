"""The summaries that rank 0 logs when a launch starts and ends."""

import logging
import shlex
import signal

from configs import Config
from data import SampleOrder, rows_of_corpus
from model import num_parameters
from tracking.metrics import last_step
from training.hardware import device_name
from training.optimizer import schedule_problem
from training.state import Run, RunState

logger = logging.getLogger("microtron")


def report_start(run: Run, state: RunState) -> None:
    """Log what is trained, on which ranks and data, and where the results go."""
    config, mesh, train = run.config, run.mesh, run.config.train
    if mesh.world.rank != 0:
        return
    size = num_parameters(config.model, config.data.padded_vocab_size)
    sources, rows = config.data.mixture.values(), rows_of_corpus(run.corpus, config).rows_of_sources
    num_rows = train.train_steps * train.global_batch_size
    epochs = SampleOrder(run.corpus.weights, rows, config.run.seed).epochs(num_rows)
    data = [
        f"{source.path or source.source}: {num:,} rows, {passes:.3g} epochs"
        for source, num, passes in zip(sources, rows, epochs, strict=True)
    ]
    logger.info(
        f"{'resuming' if state.step else 'starting'} {config.run.name} at step {state.step + 1:,}\n"
        f"  model:       {size:,} parameters\n"
        f"  ranks:       {mesh.world.size} = pp {mesh.pp.size} x dp {mesh.dp.size} x cp "
        f"{mesh.cp.size} x tp {mesh.tp.size}; {device_name(mesh.device)}; {train.precision}\n"
        f"  steps:       {state.step + 1:,} to {last_step(config):,} of {train.train_steps:,}, "
        f"each with {train.global_batch_size * config.model.seq_length:,} tokens\n"
        f"  data:        {'; '.join(data)}\n"
        f"  run folder:  {run.folder.path}"
    )
    for problem in (schedule_problem(config), pipeline_problem(run)):
        if problem is not None:
            logger.warning(problem)


def outcome(config: Config, state: RunState, stop: signal.Signals | None) -> tuple[int, str]:
    """Return the exit code of a launch that ends in this state, and the reason."""
    if stop is not None:
        return 128 + stop, f"stopped by {stop.name}"
    if state.step >= config.train.train_steps:
        return 0, "finished"
    return 0, f"reached run.stop_at_step={config.run.stop_at_step}"


def report_end(run: Run, began: RunState, state: RunState, stop: signal.Signals | None) -> int:
    """Log how the launch ended and what to do next; return the exit code."""
    folder, num_steps = run.folder, run.config.train.train_steps
    code, reason = outcome(run.config, state, stop)
    status, next_task, command = reason, "resume with", folder.resume_command()
    if reason == "finished":
        longer = f"train.train_steps={2 * max(num_steps, state.step) or 1}"
        status, next_task = "is finished", "to train longer:"
        command = folder.resume_command(longer)
    logger.info(
        f"run {run.config.run.name} {status}: step {state.step} of {num_steps} "
        f"({state.step - began.step} in this launch)\n"
        f"to generate text:\n  python generate.py run={shlex.quote(str(folder.path))}\n"
        f"{next_task}\n  {command}"
    )
    return code


def pipeline_problem(run: Run) -> str | None:
    """Why the stages of a pipeline are idle for most of a step, or None."""
    p, train = run.mesh.pp.size, run.config.train
    m = train.global_batch_size // (train.micro_batch_size * run.mesh.dp.size)
    if m >= p:
        return None
    bubble = (p - 1) / (m * run.mesh.num_chunks + p - 1)
    return (
        f"{m} micro-batches per step are fewer than the {p} stages of the pipeline, which are idle "
        f"for {bubble:.0%} of each step; use a larger train.global_batch_size, a smaller "
        "train.micro_batch_size or a smaller parallel.pipeline_model_parallel_size"
    )
