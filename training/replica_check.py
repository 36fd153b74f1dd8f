"""The check that what ranks hold alike is alike, at the start and while running."""

from parallel import find_drift
from training.optimizer import training_tensors
from training.state import Run, RunState
from training.stopping import DriftError


def audit(run: Run, state: RunState) -> None:
    """Compare the copies of weights and moments that ranks hold.

    Raises DriftError on all ranks, naming the tensors and the ranks, if any differ.
    """
    drifts = find_drift(run.model, training_tensors(run.model, run.optimizer), run.mesh)
    if drifts:
        raise DriftError(state.step, [str(drift) for drift in drifts])
