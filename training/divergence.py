"""Handle bad steps (loss spikes, losses or gradients that are not finite) and replica mismatches.

All ranks skip the update of a bad step. After too many consecutive ones the run reloads its newest
checkpoint and skips the samples since then, a few times from one checkpoint; then it ends.
"""

import logging
import math
import statistics
from dataclasses import replace

from checkpoints import CheckpointError, delete_checkpoints, find_checkpoint
from configs import TrainConfig
from parallel import compare_replicas
from training.optimizer import training_tensors
from training.resume import load
from training.run_folder import FatalError
from training.state import Run, RunState

logger = logging.getLogger("microtron")

_MISMATCHES_SHOWN = 5


class NonFiniteError(FatalError):
    """Losses, gradient norms or weights are not finite, and there is nothing left to try."""

    exit_code = 5

    def __init__(self, step: int, problem: str, *, has_checkpoint: bool = True) -> None:
        fix = "resume from the last checkpoint" if has_checkpoint else "start again"
        super().__init__(
            f"step {step}: {problem}; the run ended without saving; {fix} with a smaller "
            "optimizer.lr"
        )


class ReplicaMismatchError(FatalError):
    """Replicas of a tensor differ between ranks."""

    exit_code = 6


def skip_reason(loss: float, grad_norm: float, state: RunState, config: TrainConfig) -> str | None:
    """Return the reason to skip the update of a step, or None; the same on all ranks.

    The arguments are sums over ranks, so NaN or infinity on one rank reaches all.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"the loss is {loss}, the gradient norm {grad_norm}"
    if (
        config.loss_spike_threshold_nats is not None
        and len(state.recent_losses) == RunState.NUM_RECENT
    ):
        median = statistics.median(state.recent_losses)
        if loss > median + config.loss_spike_threshold_nats:
            return f"the loss is {loss:.4f}, the recent median {median:.4f}"
    return None


def too_many_skipped(state: RunState, config: TrainConfig) -> bool:
    """Whether the run must roll back."""
    return state.skipped_in_a_row > config.max_consecutive_skips


def roll_back(run: Run, state: RunState) -> RunState:
    """Load the newest checkpoint from before the skipped steps, and skip the samples since then.

    Deletes newer checkpoints: [Note: saves and skipped steps]. Raises NonFiniteError on all ranks
    if there is no checkpoint, or after `train.max_rollbacks` rollbacks to it.
    """
    max_rollbacks = run.config.train.max_rollbacks
    skipped = f"{state.skipped_in_a_row} consecutive updates skipped"
    try:
        checkpoint = find_checkpoint(run.folder.checkpoints, run.mesh, up_to=state.last_good_step)
    except CheckpointError as error:
        problem = f"{skipped}, and {error}"
        raise NonFiniteError(state.step, problem, has_checkpoint=False) from error
    if checkpoint is None:
        problem = f"{skipped}, and there is no checkpoint to roll back to"
        raise NonFiniteError(state.step, problem, has_checkpoint=False)
    rollbacks = sum(window[0] == checkpoint.step for window in state.skipped_windows)
    if rollbacks >= max_rollbacks:
        after = f"after {rollbacks} rollback{'s' * (rollbacks != 1)} to step {checkpoint.step}"
        limit = f"(train.max_rollbacks={max_rollbacks})"
        raise NonFiniteError(state.step, f"{skipped} {after} {limit}")
    before = load(run, checkpoint)
    window = (before.step, before.consumed_samples, state.consumed_samples)
    logger.warning(
        "%s: rolling back from step %d to step %d and skipping samples %d to %d",
        skipped,
        state.step,
        *window[:2],
        window[2] - 1,
    )
    if run.mesh.world.rank == 0:
        delete_checkpoints(run.folder.checkpoints, after=before.step, up_to=state.step)
    return replace(
        before,
        skipped_in_a_row=0,
        consumed_samples=state.consumed_samples,
        skipped_windows=(*state.skipped_windows, window),
    )


def check_replicas(run: Run, state: RunState) -> None:
    """Compare the copies of weights and moments that ranks share.

    Raises ReplicaMismatchError on all ranks if any differ.
    """
    found = compare_replicas(run.model, training_tensors(run.model, run.optimizer), run.mesh)
    if found:
        shown = "; ".join(found[:_MISMATCHES_SHOWN])
        more = len(found) - _MISMATCHES_SHOWN
        raise ReplicaMismatchError(
            f"step {state.step}: ranks hold different copies of {shown}"
            f"{f'; and of {more} more' if more > 0 else ''}; the run ended without saving; resume "
            "from the last checkpoint, and if the same rank is named again, exclude its host"
        )
