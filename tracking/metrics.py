"""What a person and a program can see of a run: the console, metrics.jsonl, and a wandb view of it.

metrics.jsonl is the truth: a JSON object for each step, flushed, in full precision; samples.jsonl
has the texts. A resume cuts both at the checkpoint's step, so they hold each step once. Only rank 0
writes. wandb is sent what these files say (tracking/wandb_view.py).
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from configs import Config
from model import flops_per_token
from parallel import sum_over
from tracking.console import Line, duration, printable
from tracking.wandb_run import Launch, about
from tracking.wandb_view import WandbView
from training.evaluation import EvalResult
from training.hardware import peak_flops_per_second, peak_memory_gib
from training.state import Run, RunState, StepResult, curve_fingerprint

logger = logging.getLogger("microtron")

# A rate from the last few seconds says more about the time left than one from the first step on.
_RATE_MEMORY = 0.9


class RunLog:
    """The open log of a run."""

    def __init__(self, run: Run, state: RunState) -> None:
        self.config, self.mesh = run.config, run.mesh
        self.is_writer = run.mesh.world.rank == 0
        peak = peak_flops_per_second(run.mesh.device, run.config.train.precision)
        of_rank = torch.tensor(peak, dtype=torch.float64, device=run.mesh.device)
        self.peak_flops = sum_over(run.mesh.world, of_rank).item()
        self.seconds_per_step: float | None = None
        self.file: IO[str] | None = None
        self.samples = run.folder.samples
        self.wandb: WandbView | None = None
        if self.is_writer:
            cut_rows(run.folder.metrics, state.step)
            cut_rows(run.folder.samples, state.step)
            self.file = run.folder.metrics.open("a")
            launch = Launch(
                wandb_id=state.wandb_id,
                step=state.step,
                curve_fingerprint=curve_fingerprint(
                    run.config, state.skipped_windows, run.corpus.identity
                ),
                about=about(run.config, run.mesh),
            )
            self.wandb = WandbView(run.config.logging, run.folder.path, launch)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.wandb is not None:
            self.wandb.finish(failed=kind is not None)

    def step(self, state: RunState, result: StepResult) -> None:
        """One finished update."""
        tokens_per_second = result.num_targets / result.elapsed_s
        model, vocab_size = self.config.model, self.config.data.vocab_size
        flops = tokens_per_second * flops_per_token(model, vocab_size, result.mean_row_length)
        self.peak_flops = max(self.peak_flops, flops)  # it may have been measured on a busy machine
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
        is_first, is_last = self.seconds_per_step is None, state.step == last_step(self.config)
        previous = self.seconds_per_step or result.elapsed_s
        self.seconds_per_step = _RATE_MEMORY * previous + (1 - _RATE_MEMORY) * result.elapsed_s
        if result.why_skipped is not None and self.is_writer:
            logger.warning("step %d: %s; its update is left out", state.step, result.why_skipped)
        if is_first or is_last or state.step % self.config.logging.log_interval == 0:
            logger.info(self._step_line(state, row))

    def evaluation(self, state: RunState, evaluation: EvalResult) -> None:
        """One evaluation, and its sample."""
        row = {
            "step": state.step,
            "eval/loss": evaluation.loss,
            "eval/perplexity": evaluation.perplexity,
            "eval/bits_per_byte": evaluation.bits_per_byte,
        }
        if evaluation.num_unknown:
            row["eval/unknown_fraction"] = evaluation.num_unknown / evaluation.num_targets
        self._write(row)
        logger.info(
            "evaluation at step %d: loss %.4f, perplexity %.2f, %.4f bits per byte",
            state.step,
            evaluation.loss,
            evaluation.perplexity,
            evaluation.bits_per_byte,
        )
        for warning in evaluation.warnings if self.is_writer else ():
            logger.warning("%s", warning)
        if evaluation.sample is not None:
            sample = printable(evaluation.sample.rstrip())
            logger.info("--- sample ---\n%s\n--------------", sample)
            if self.is_writer:
                with self.samples.open("a") as file:
                    file.write(json.dumps({"step": state.step, "text": evaluation.sample}) + "\n")

    def _write(self, row: Mapping[str, float | int]) -> None:
        if self.file is not None:
            # JSON has no NaN: what is not finite is null.
            finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
            self.file.write(json.dumps(finite, allow_nan=False) + "\n")
            self.file.flush()

    def _step_line(self, state: RunState, row: Mapping[str, float | int]) -> Line:
        last = last_step(self.config)
        assert self.seconds_per_step is not None
        return Line(
            (f"step {state.step:>{len(str(last))}}/{last}", "plain"),
            (" | ", "dim"),
            (f"loss {row['train/loss']:.4f}", "bold"),
            (
                f" | grad norm {row['train/grad_norm']:.3f}"
                f" | lr {row['train/learning_rate']:.2e}"
                f" | {row['speed/tokens_per_second']:,.0f} tokens/s"
                f" | mfu {100 * row['speed/mfu']:.1f}%"
                f" | {row['memory/peak_gib']:.2f} GiB"
                f" | {duration((last - state.step) * self.seconds_per_step)} left",
                "dim",
            ),
        )


def last_step(config: Config) -> int:
    """The step at which this launch ends."""
    stop = config.run.stop_at_step
    return config.train.train_steps if stop is None else min(stop, config.train.train_steps)


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows after `step`, and a last line that a kill has torn."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        if json.loads(line)["step"] <= step:
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)
