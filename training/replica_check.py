"""The check that what ranks hold alike is alike, at the start and while running."""

from parallel import compare_replicas
from training.optimizer import training_tensors
from training.state import Run, RunState
from training.stopping import ReplicaMismatchError


def check_replicas(run: Run, state: RunState) -> None:
    """Compare the copies of weights and moments that ranks hold.

    Raises ReplicaMismatchError on all ranks, naming the tensors and the ranks, if any differ.
    """
    drifts = compare_replicas(run.model, training_tensors(run.model, run.optimizer), run.mesh)
    if drifts:
        raise ReplicaMismatchError(state.step, [str(drift) for drift in drifts])
