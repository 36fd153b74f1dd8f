"""Cost of one of our steps besides training: making its batch, and logging it.

A thread makes batches ahead of time, so a step seldom waits for one; the whole time to make one is
reported. Logging is what train.py does after a step: the row of metrics.jsonl and the console line,
while a thread passes earlier rows to wandb.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from bench.ours import corpus_of, settings
from bench.timing import report
from bench.workload import parse
from configs import Config, parse_config
from model import GPT
from parallel import Mesh, close_mesh, init_mesh
from tracking.console import set_up_logging
from tracking.metrics import RunLog
from training.optimizer import build_optimizer
from training.run_folder import RunFolder
from training.state import Run, RunState, StepResult, training_batches

_STEPS = 50
_RESULT = StepResult(9.7, 0.0, 1.0, 3e-4, 4096, 512, 1.0, None)  # of any step


def measure(config: Config, mesh: Mesh) -> dict[str, float]:
    """Median seconds of making a batch, and of logging a step."""
    with RunFolder(config, mesh) as folder:
        folder.path.mkdir(parents=True, exist_ok=True)
        # On the meta device, because it is not used.
        model = GPT(config.model, config.data.padded_vocab_size, mesh)
        optimizer = build_optimizer(model, config.optimizer)
        run, state = (
            Run(config, mesh, folder, corpus_of(config), model, optimizer),
            RunState(wandb_id="bench"),
        )
        with training_batches(run, state) as batches:
            batch_s = _median_s(lambda: next(batches))
        with RunLog(run, state) as log:

            def log_step() -> None:
                nonlocal state
                state = state.advance(_RESULT, config.train.global_batch_size)
                log.step(state, _RESULT)

            log_s = _median_s(log_step)
    return {"batch_s": batch_s, "log_s": log_s}


def _median_s(action: Callable[[], object]) -> float:
    times = []
    for _ in range(_STEPS):
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return statistics.median(times)


def main() -> int:
    """One process; what ranks agree on in a step is timed as part of it."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(
            [
                *settings(arguments.workload),
                f"run.directory={folder}",
                "logging.wandb=offline",
                f"train.train_steps={_STEPS}",
                *arguments.overrides,
            ]
        )
        mesh = init_mesh(1, sequence_parallel=False)
        set_up_logging(mesh.world.rank)
        torch.manual_seed(0)
        report(dict(measure(config, mesh)))
        close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
