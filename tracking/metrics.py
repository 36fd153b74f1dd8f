"""Log a run: metrics.jsonl, samples.jsonl, the console, TensorBoard and wandb.

metrics.jsonl is the source of truth: one JSON object per line, in full precision, written at every
step. A resume truncates it and samples.jsonl at the checkpoint. Only rank 0 writes files.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from configs import Config, os_error_text
from model import flops_per_token
from parallel import any_rank, sum_over
from tracking.console import duration, printable
from tracking.tensorboard_writer import TensorBoardWriter
from tracking.wandb_forwarder import WandbForwarder, wandb_config
from training.evaluation import EvalResult
from training.hardware import peak_flops_per_second, peak_memory_gib
from training.state import Run, RunState, StepResult

logger = logging.getLogger("microtron")

_SMOOTHING = 0.9  # of the step time, to estimate the time left


class RunLog:
    """The open log of a run."""

    def __init__(self, run: Run, state: RunState) -> None:
        self.config, self.mesh = run.config, run.mesh
        self.rows, self.samples = JsonLines(run.folder.metrics), JsonLines(run.folder.samples)
        self.is_writer = run.mesh.world.rank == 0
        peak = peak_flops_per_second(run.mesh.device, run.config.train.precision)
        rank_peak = torch.tensor(peak, dtype=torch.float64, device=run.mesh.device)
        self.peak_flops = sum_over(run.mesh.world, rank_peak).item()
        self.seconds_per_step: float | None = None
        self.views: list[TensorBoardWriter | WandbForwarder] = []
        last_row = truncate_rows(run.folder.metrics, state.step) if self.is_writer else {}
        # Whether the last step has no evaluation, because a signal or a kill has ended it.
        self.lacks_evaluation = any_rank(run.mesh, "train/loss" in last_row)
        if self.is_writer:
            truncate_rows(run.folder.samples, state.step)
            folder, sent_config = run.folder.path, wandb_config(run.config, run.mesh)
            sent_config["origin"] = state.origin
            with self._failures_as_warnings("TensorBoard"):
                self.views.append(TensorBoardWriter(folder / "tensorboard", state.step + 1))
            self.views.append(
                WandbForwarder(run.config.logging, folder, state.wandb_id, sent_config)
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.rows.close()
        self.samples.close()
        for view in self.views:
            with self._failures_as_warnings(type(view).__name__):
                view.finish(failed=kind is not None)

    @contextlib.contextmanager
    def _failures_as_warnings(self, name: str) -> Iterator[None]:
        """Log what a full disk or a missing package does to a view; metrics.jsonl has all rows."""
        try:
            yield
        except (OSError, ImportError) as error:
            logger.warning("%s: %s; training continues without it", name, error)

    def _show(self, row: Mapping[str, Any]) -> None:
        """Pass a row to the views, and drop a view that fails."""
        views, self.views = self.views, []
        for view in views:
            with self._failures_as_warnings(type(view).__name__):
                view.log(row)
                self.views.append(view)

    def step(self, state: RunState, result: StepResult) -> None:
        """Log a finished step."""
        tokens_per_second = result.num_targets / result.elapsed_s
        model, vocab_size = self.config.model, self.config.data.padded_vocab_size
        flops = tokens_per_second * flops_per_token(model, vocab_size, result.mean_row_length)
        self.peak_flops = max(self.peak_flops, flops)  # a measured peak may be too low
        row = {
            "step": state.step,
            "tokens": state.tokens,
            "train/loss": result.loss,
            **({"train/z_loss": result.z_loss} if self.config.train.z_loss_coeff else {}),
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            **({"train/skipped_steps": state.skipped_steps} if state.skipped_steps else {}),
            "speed/tokens_per_second": tokens_per_second,
            "speed/mfu": flops / self.peak_flops,
            "memory/peak_gib": peak_memory_gib(self.mesh.device),
        }
        self._write(row)
        self.lacks_evaluation = True
        is_first, last = self.seconds_per_step is None, last_step(self.config)
        previous = self.seconds_per_step or result.elapsed_s
        self.seconds_per_step = _SMOOTHING * previous + (1 - _SMOOTHING) * result.elapsed_s
        if result.why_skipped is not None and self.is_writer:
            logger.warning("step %d: %s; skipping its update", state.step, result.why_skipped)
        if is_first or state.step == last or state.step % self.config.logging.log_interval == 0:
            logger.info(
                f"step {state.step:>{len(str(last))}}/{last} | loss {result.loss:.4f}"
                f" | grad norm {result.grad_norm:.3f} | lr {result.learning_rate:.2e}"
                f" | {tokens_per_second:,.0f} tokens/s | mfu {100 * row['speed/mfu']:.1f}%"
                f" | {row['memory/peak_gib']:.2f} GiB"
                f" | {duration((last - state.step) * self.seconds_per_step)} left"
            )

    def evaluation(self, state: RunState, evaluation: EvalResult | None) -> None:
        """Log an evaluation and its sample, unless a signal has ended it."""
        if evaluation is None:
            return
        row: dict[str, float] = {"step": state.step}
        if evaluation.num_targets:
            row["eval/loss"] = evaluation.loss
            row["eval/perplexity"] = evaluation.perplexity
            row["eval/bits_per_byte"] = evaluation.bits_per_byte
            message = "evaluation at step %d: loss %.4f, perplexity %.2f, %.4f bits per byte"
            logger.info(message, *row.values())
        for task in evaluation.tasks:
            row |= {f"eval/{task.name}/{name}": value for name, value in task.metrics.items()}
            logger.info("%s at step %d: %s", task.name, state.step, task)
        if evaluation.num_unknown:
            row["eval/unknown_fraction"] = evaluation.num_unknown / evaluation.num_targets
        self._write(row)
        self.lacks_evaluation = False
        for warning in evaluation.warnings if self.is_writer else ():
            logger.warning("%s", warning)
        if evaluation.sample is not None:
            self._write_sample(state.step, evaluation.sample)

    def _write(self, row: Mapping[str, float | int]) -> None:
        if self.is_writer:
            row = {**row, "time_s": time.time()}
            # JSON has no NaN or infinity: they become null.
            finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
            self.rows.write(finite)
            self._show({key: value for key, value in finite.items() if value is not None})

    def _write_sample(self, step: int, text: str) -> None:
        logger.info("--- sample ---\n%s\n--------------", printable(text.rstrip()))
        if self.is_writer:
            self.samples.write({"step": step, "text": text})
            self._show({"step": step, "time_s": time.time(), "sample": text})


class JsonLines:
    """Appends lines to a file. What a full disk refuses is kept, and tried again with the next."""

    def __init__(self, path: Path) -> None:
        self._path, self._unwritten, self._has_failed = path, bytearray(), False

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, after those that are left; an OSError is logged once."""
        for row in rows:
            self._unwritten += json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            while self._unwritten:
                with self._path.open("ab", buffering=0) as file:
                    # There may be room for a part of a line; the rest follows it later.
                    del self._unwritten[: file.write(self._unwritten)]
        except OSError as error:
            if not self._has_failed:
                text = "cannot write %s: %s; training continues, and its lines are tried again"
                logger.warning(text, self._path, os_error_text(error))
            self._has_failed = True

    def close(self) -> None:
        """Try for the last time to write what is left."""
        self.write()
        if lost := self._unwritten.count(b"\n"):
            logger.warning("%s: the last %d lines are lost", self._path, lost)


def last_step(config: Config) -> int:
    """Return the step at which this launch ends."""
    stop = config.run.stop_at_step
    return config.train.train_steps if stop is None else min(stop, config.train.train_steps)


def truncate_rows(path: Path, step: int) -> dict[str, Any]:
    """Remove the rows after `step`, and incomplete lines; return the last that is left."""
    last, kept = {}, bytearray()
    if path.exists():
        content = path.read_bytes()
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                if row["step"] > step:
                    break
            except (ValueError, TypeError, KeyError):  # the machine has crashed during a write
                logger.warning("%s: removing line %d, which is not a row", path, number)
                continue
            last = row
            kept += line + b"\n"
        if not content.startswith(kept):
            path.with_suffix(".tmp").write_bytes(kept)
            path.with_suffix(".tmp").replace(path)
        os.truncate(path, len(kept))  # in place, which a full disk allows
    return last
