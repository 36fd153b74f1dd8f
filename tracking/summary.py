"""The summaries that rank 0 logs when a launch starts and ends."""

import logging
import shlex
import signal

from checkpoints.manifest import step_directory
from configs import Config
from configs.layout import stage_layers
from data import SampleOrder, rows_of_corpus
from model import num_parameters
from tracking.console import StyledLine, log_table
from tracking.metrics import last_step
from training.hardware import device_name
from training.optimizer import schedule_problem
from training.state import Run, RunState

logger = logging.getLogger("microtron")


def report_start(run: Run, state: RunState) -> None:
    """Log what is trained, on which ranks and data, and where the results go."""
    if run.mesh.world.rank != 0:
        return
    config, name = run.config, run.config.run.name
    title = f"resuming {name} at step {state.step + 1}" if state.step else f"starting {name}"
    logger.info(StyledLine((title, "bold")))
    log_table(
        {
            "model": _model(config),
            "origin": _origin(config, state),
            "ranks": _ranks(run),
            "steps": _steps(config, state),
            "data": _data(run),
            "run folder": str(run.folder.path),
            "wandb": config.logging.wandb,
            "dashboard": _dashboard(config),
        }
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
    if run.mesh.world.rank != 0:
        return code
    name, this_launch = run.config.run.name, state.step - began.step
    status = "is finished" if reason == "finished" else reason
    logger.info(
        f"run {name} {status}: step {state.step} of {num_steps} ({this_launch} in this launch)"
    )
    # Loaded or committed by this launch, so it is whole; a newer directory may be damaged.
    saved = step_directory(folder.checkpoints, state.step) if state.step else None
    generate = f"python generate.py run={shlex.quote(str(folder.path))}"
    log_table(
        {
            "checkpoint": str(saved or ""),
            "to generate text": generate if saved else "",
            "dashboard": _dashboard(run.config),
        }
    )
    if reason == "finished":
        longer = folder.resume_command(f"train.train_steps={2 * max(num_steps, state.step) or 1}")
        logger.info("to train longer:\n  %s", longer)
    else:
        logger.info("resume with\n  %s", folder.resume_command())
    return code


def _model(config: Config) -> str:
    model, vocab_size = config.model, config.data.padded_vocab_size
    return (
        f"{num_parameters(model, vocab_size):,} parameters: {model.num_layers} layers, hidden size "
        f"{model.hidden_size:,}, {model.num_attention_heads} heads, vocabulary {vocab_size:,}"
    )


def _origin(config: Config, state: RunState) -> str:
    if (origin := state.origin) is None:
        return ""
    optimizer = " and optimizer state" if config.run.init_optimizer else ""
    return f"weights{optimizer} of run {origin['run']} at step {origin['step']:,}"


def _ranks(run: Run) -> str:
    mesh, precision = run.mesh, str(run.config.train.precision)
    if precision == "bf16" and mesh.device.type == "cpu" and run.precision is not None:
        precision += f" (matmuls {run.precision.matmul}, attention {run.precision.attention})"
    sp = " with sequence parallelism" if mesh.sequence_parallel else ""
    cp = f" x cp {mesh.cp.size}" if mesh.cp.size > 1 else ""
    layout = f"{mesh.world.size} = tp {mesh.tp.size}{sp}{cp} x dp {mesh.dp.size}"
    if mesh.pp.size > 1:
        layout += f" x pp {mesh.pp.size} ({_layers_of_stages(run)})"
    return f"{layout}; {device_name(mesh.device)}; {precision}"


def _layers_of_stages(run: Run) -> str:
    mesh, num_layers = run.mesh, run.config.model.num_layers
    num_pieces = mesh.pp.size * mesh.num_chunks
    sizes = [len(stage_layers(num_layers, num_pieces, piece)) for piece in range(num_pieces)]
    stages = [" + ".join(map(str, sizes[stage :: mesh.pp.size])) for stage in range(mesh.pp.size)]
    return f"layers of each stage: {', '.join(stages)}"


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


def _steps(config: Config, state: RunState) -> str:
    rows, seq_length = config.train.global_batch_size, config.model.seq_length
    return (
        f"{state.step + 1:,} to {last_step(config):,} of {config.train.train_steps:,}, each with "
        f"{rows:,} rows of {seq_length:,} tokens ({rows * seq_length:,} tokens)"
    )


def _data(run: Run) -> str:
    config, corpus = run.config, run.corpus
    rows_of_sources = rows_of_corpus(corpus, config).rows_of_sources
    num_rows = config.train.train_steps * config.train.global_batch_size
    epochs = SampleOrder(corpus.weights, rows_of_sources, config.run.seed).epochs(num_rows)
    return "; ".join(
        f"{source.path or source.source}: {rows:,} rows, {number:.3g} epochs"
        for source, rows, number in zip(
            config.data.mixture.values(), rows_of_sources, epochs, strict=True
        )
    )


def _dashboard(config: Config) -> str:
    directory = config.run.directory
    if directory == "runs":
        return "make dashboard"
    return f"make dashboard ARGS={shlex.quote(f'--logdir={directory}')}"
