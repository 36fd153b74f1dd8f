"""What is done about a loss or gradient norm that is not finite, or a loss that jumps.

The update of such a step is left out, on all ranks, and the next samples are tried. If that happens
too often in a row, it is not the samples: the run goes back to its newest checkpoint and passes
over the samples since. It does so a few times from one checkpoint, and then ends.
"""

import logging
import math
import statistics
from dataclasses import replace

from checkpoints import CheckpointError, delete_checkpoints, find_checkpoint
from configs import TrainConfig
from parallel import Mesh, any_rank
from training.state import Run, RunState, load
from training.stopping import NonFiniteError

logger = logging.getLogger("microtron")


def skip_reason(
    loss: float, grad_norm: float, state: RunState, config: TrainConfig, mesh: Mesh
) -> str | None:
    """Why the update of a step must be left out; None if it is good. All ranks answer alike."""
    reason = None
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        reason = f"the loss is {loss}, the gradient norm {grad_norm}"
    elif (
        config.loss_spike_threshold_nats is not None
        and len(state.recent_losses) == RunState.NUM_RECENT
    ):
        usual = statistics.median(state.recent_losses)
        if loss > usual + config.loss_spike_threshold_nats:
            reason = f"the loss is {loss:.4f}, usually {usual:.4f}"
    # A rank that alone went on would part from the others for good.
    if any_rank(mesh, reason is not None):
        return reason or "the loss or gradient norm of another rank is not finite"
    return None


def too_many_skipped(state: RunState, config: TrainConfig) -> bool:
    """Whether leaving out updates does not help."""
    return state.skipped_in_a_row > config.max_consecutive_skips


def roll_back(run: Run, state: RunState) -> RunState:
    """Load the newest checkpoint from before the skipped steps; pass over the samples since.

    Those within the row are deleted: see [Note: saves and skipped steps].

    Raises NonFiniteError on all ranks if there is none, or if that was tried often enough.
    """
    config = run.config.train
    what = f"{state.skipped_in_a_row} updates in a row had to be left out"
    try:
        checkpoint = find_checkpoint(run.folder.checkpoints, run.mesh, up_to=state.last_good_step)
    except CheckpointError as error:
        raise NonFiniteError(state.step, f"{what}, and {error}") from error
    if checkpoint is None:
        raise NonFiniteError(state.step, f"{what}, and there is no checkpoint to go back to")
    tried = sum(window[0] == checkpoint.step for window in state.skipped_windows)
    if tried >= config.max_rollbacks:
        raise NonFiniteError(
            state.step,
            f"{what}, after going back to step {checkpoint.step} {tried} times "
            f"(train.max_rollbacks={config.max_rollbacks})",
        )
    before = load(run, checkpoint)
    window = (before.step, before.consumed_samples, state.consumed_samples)
    logger.warning(
        "%s: going back from step %d to step %d, passing over samples %d to %d",
        what,
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
