"""The summaries that rank 0 logs when a launch starts and ends."""

import logging
import shlex
import signal

from checkpoints.manifest import step_directory
from configs import Config
from configs.layout import stage_layers
from data import SampleOrder
from data.loader import rows_of_corpus
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
    facts = {
        "model": f"{size:,} parameters",
        "origin": _origin(config, state),
        "ranks": _ranks(run),
        "steps": f"{state.step + 1:,} to {last_step(config):,} of {train.train_steps:,}, each with "
        f"{train.global_batch_size * config.model.seq_length:,} tokens",
        "data": "; ".join(data),
        "run folder": str(run.folder.path),
        "dashboard": _dashboard(config),
    }
    title = f"resuming {config.run.name}" if state.step else f"starting {config.run.name}"
    lines = [f"  {name + ':':<13}{fact}" for name, fact in facts.items() if fact]
    logger.info("\n".join([f"{title} at step {state.step + 1:,}", *lines]))
    for problem in (schedule_problem(config), pipeline_problem(run)):
        if problem is not None:
            logger.warning(problem)


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
    axes = {"cp": mesh.cp.size, "dp": mesh.dp.size, "pp": mesh.pp.size}
    others = "".join(f" x {axis} {size}" for axis, size in axes.items() if size > 1)
    layout = f"{mesh.world.size} = tp {mesh.tp.size}{sp}{others}"
    if mesh.replicas.size > 1:
        layout += f" (HSDP with {mesh.replicas.size} replicas)"
    if mesh.pp.size > 1:
        num_layers, num_pieces = run.config.model.num_layers, mesh.pp.size * mesh.num_chunks
        sizes = [str(len(stage_layers(num_layers, num_pieces, n))) for n in range(num_pieces)]
        stages = [" + ".join(sizes[stage :: mesh.pp.size]) for stage in range(mesh.pp.size)]
        layout += f" (layers of each stage: {', '.join(stages)})"
    return f"{layout}; {device_name(mesh.device)}; {precision}"


def _dashboard(config: Config) -> str:
    directory = config.run.directory
    if directory == "runs":
        return "make dashboard"
    return f"make dashboard ARGS={shlex.quote(f'--logdir={directory}')}"


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
        longer = [f"train.train_steps={2 * max(num_steps, state.step) or 1}"]
        if run.config.train.time_limit_s is not None:
            longer.insert(0, "train.time_limit_s=null")
        status, next_task = "is finished", "to train longer:"
        command = folder.resume_command(*longer)
    # Loaded or committed by this launch, so it is whole; a newer directory may be damaged.
    saved = step_directory(folder.checkpoints, state.step) if state.step else None
    tasks = {}
    if saved is not None:
        generate = f"python generate.py run={shlex.quote(str(folder.path))}"
        tasks = {"checkpoint:": str(saved), "to generate text:": generate}
    tasks[next_task] = command
    title = f"run {run.config.run.name} {status}: step {state.step} of {num_steps}"
    lines = [f"{title} ({state.step - began.step} in this launch)"]
    lines += [f"{task}\n  {command}" for task, command in tasks.items()]
    logger.info("\n".join(lines))
    return code


def pipeline_problem(run: Run) -> str | None:
    """Describe a pipeline with too few micro-batches; None otherwise."""
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
