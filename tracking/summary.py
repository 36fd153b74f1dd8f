"""What a person is told when a launch begins and when it ends, in a few lines each."""

import json
import logging
import operator
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.manifest import step_directory
from configs import Config
from data import SampleOrder, rows_of_corpus
from model import num_parameters
from tracking.console import Line, duration, log_table
from tracking.metrics import last_step
from training.optimizer import schedule_problem
from training.state import Run, RunState

logger = logging.getLogger("microtron")

_WANDB = {
    "auto": "online if there is a key, else offline",
    "online": "online",
    "offline": "offline; `wandb sync {}` sends it",
    "disabled": "",
}
Row = dict[str, Any]


def report_start(run: Run, state: RunState) -> None:
    """Say what is trained on how much, by whom, and where everything goes."""
    if run.mesh.world.rank != 0:
        return
    begins = f"goes on after step {state.step}" if state.step else "begins"
    logger.info(Line((f"run {run.config.run.name} {begins}", "bold")))
    log_table(
        {
            "model": _model(run.config),
            "ranks": _ranks(run),
            "plan": _plan(run, state),
            "folder": _folder(run),
            "wandb": _WANDB[run.config.logging.wandb].format(run.folder.path / "wandb"),
            "profile": _profile(run, state),
            "to look at": _dashboard(run.config),
        }
    )
    if problem := schedule_problem(run.config):
        logger.warning(problem)


def outcome(config: Config, state: RunState, stop: signal.Signals | None) -> tuple[int, str]:
    """The exit code of a launch that has ended in this state, and the reason for it."""
    if stop is not None:
        return 128 + stop, f"stopped by {stop.name}"
    if state.step >= config.train.train_steps:
        return 0, "finished"
    return 0, f"reached run.stop_at_step={config.run.stop_at_step}"


def report_end(run: Run, began: RunState, state: RunState, stop: signal.Signals | None) -> int:
    """Say on the console how the launch ended; returns the exit code."""
    folder, num_steps = run.folder, run.config.train.train_steps
    code, reason = outcome(run.config, state, stop)
    if run.mesh.world.rank != 0:
        return code
    logger.info(
        "run %s %s: step %d of %d (%d in this launch)",
        run.config.run.name,
        f"is {reason}" if reason == "finished" else reason,
        state.step,
        num_steps,
        state.step - began.step,
    )
    progress = read_progress(folder.metrics, began)
    # Loaded or committed by this launch, so it is whole; a newer directory may be damaged.
    saved = step_directory(folder.checkpoints, state.step) if state.step else None
    log_table(
        {
            "best": _best(progress),
            "this launch": _launch(progress, began, state, time.monotonic() - folder.opened_at),
            "skipped": _skipped(state),
            "checkpoint": str(saved or ""),
            "to look at": _dashboard(run.config),
            "to sample": f"python generate.py run={shlex.quote(str(folder.path))}" if saved else "",
        }
    )
    if reason == "finished":
        more = folder.resume_command(f"train.train_steps={2 * max(num_steps, state.step) or 1}")
        logger.info("train on with\n  %s", more)
    else:
        logger.info("resume with\n  %s", folder.resume_command())
    return code


@dataclass(frozen=True)
class Progress:
    """What metrics.jsonl says at the end of a launch."""

    best: Row | None = None  # the evaluation with the fewest bits per byte, of the whole run
    last: Row | None = None  # the last step
    in_steps_s: float = 0.0  # of this launch, without what was taken back


def read_progress(metrics: Path, began: RunState) -> Progress:
    """Read the file once, row by row; `began` is the state that the launch began with."""
    best, last, tokens, in_steps_s = None, None, began.tokens, 0.0
    for row in _rows(metrics):
        bits = row.get("eval/bits_per_byte")  # none in the row of a step; null if not finite
        if bits is not None and (best is None or bits < best["eval/bits_per_byte"]):
            best = row
        if "train/loss" in row:
            last = row
            if row["step"] > began.step and row["speed/tokens_per_second"]:
                in_steps_s += (row["tokens"] - tokens) / row["speed/tokens_per_second"]
                tokens = row["tokens"]
    return Progress(best, last, in_steps_s)


def _rows(metrics: Path) -> Iterator[Row]:
    """Without a last line that a kill has torn."""
    if metrics.exists():
        with metrics.open() as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def _best(progress: Progress) -> str:
    if progress.best is None:
        return ""
    bits, loss = progress.best["eval/bits_per_byte"], progress.best["eval/loss"]
    return f"{bits:.4f} bits per byte, loss {loss:.4f}, at step {progress.best['step']}"


def _launch(progress: Progress, began: RunState, state: RunState, elapsed_s: float) -> str:
    steps, tokens = state.step - began.step, state.tokens - began.tokens
    if progress.last is None or not progress.in_steps_s:
        return ""
    return (
        f"{steps:,} steps, {tokens:,} tokens in {duration(elapsed_s)}, of which "
        f"{duration(progress.in_steps_s)} in steps: {tokens / progress.in_steps_s:,.0f} tokens/s; "
        f"peak {progress.last['memory/peak_gib']:.2f} GiB on rank 0"
    )


def _skipped(state: RunState) -> str:
    parts = []
    if state.skipped_steps:
        parts.append(f"the updates of {state.skipped_steps:,} steps")
    if state.skipped_windows:
        samples = sum(end - start for _, start, end in state.skipped_windows)
        parts.append(f"{samples:,} samples, going back {len(state.skipped_windows)} times")
    return "; ".join(parts)


def _model(config: Config) -> str:
    model = config.model
    groups = f" in {model.num_groups} groups" if model.num_query_groups else ""
    return (
        f"{num_parameters(model, config.data.vocab_size):,} parameters: {model.num_layers} layers, "
        f"hidden size {model.hidden_size:,}, {model.num_attention_heads} heads{groups}, "
        f"vocabulary {config.data.vocab_size:,}"
    )


def _ranks(run: Run) -> str:
    mesh = run.mesh
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_name(mesh.device)
    else:
        threads = torch.get_num_threads()
        device = f"{threads} thread{'s' * (threads > 1)} of {mesh.device.type}"
    how = " with sequence parallelism" if mesh.sequence_parallel else ""
    layout = f"tensor parallel {mesh.tp.size}{how} x data parallel {mesh.dp.size}, each "
    precision = {"bf16": "bf16 with float32 weights", "fp32": "float32"}
    return (
        f"{mesh.world.size}{f': {layout}' if mesh.world.size > 1 else ' on '}{device}; "
        f"{precision[run.config.train.precision]}"
    )


def _plan(run: Run, state: RunState) -> str:
    config, corpus, steps = run.config, run.corpus, run.config.train.train_steps
    rows_of_sources = rows_of_corpus(corpus, config).rows_of_sources
    num_rows = steps * config.train.global_batch_size
    epochs = SampleOrder(corpus.weights, rows_of_sources, config.run.seed).epochs(num_rows)
    if _has_full_rows(config) and not config.data.inter_document_masking:
        tokens = f"{num_rows * config.model.seq_length:,}"
    else:  # of each document all tokens but the first are targets
        targets = [part.num_tokens - part.num_documents for part in corpus.train.parts]
        tokens = f"about {sum(map(operator.mul, epochs, targets)):,.0f}"
    told = []
    for name, number, rows in zip(config.data.mixture, epochs, rows_of_sources, strict=True):
        of = f"{name}, " if len(epochs) > 1 else ""
        amount = f"{number:,.1f}" if number >= 1 else f"{number:.2g}"
        told.append(f"{amount} epochs of {of}{rows:,} rows")
    first, last = state.step + 1, last_step(config)
    part = "" if (first, last) == (1, steps) else f"; in this launch steps {first:,} to {last:,}"
    rows = config.train.global_batch_size
    return f"{steps:,} steps of {rows:,} rows, {tokens} tokens, {'; '.join(told)}{part}"


def _has_full_rows(config: Config) -> bool:
    return config.data.sequence_mode == "pack" and config.data.packing == "stream"


def _folder(run: Run) -> str:
    """Where what the run writes goes."""
    save = run.config.checkpoint
    when = f"every {save.save_interval:,} steps and " if save.save_interval else ""
    kept = f", of which the newest {save.keep} are kept" if save.keep else ""
    return f"{run.folder.path}, with checkpoints {when}at the end{kept}"


def _profile(run: Run, state: RunState) -> str:
    steps = run.config.logging.profile_steps
    if steps is None:
        return ""
    is_here = steps[0] <= last_step(run.config) and steps[1] > state.step
    where = f", {run.folder.profile}" if is_here else ": not in this launch"
    return f"steps {steps[0]:,} to {steps[1]:,}{where}"


def _dashboard(config: Config) -> str:
    directory = config.run.directory
    if directory == "runs":
        return "make dashboard"
    return f"make dashboard ARGS={shlex.quote(f'runs={directory}')}"
