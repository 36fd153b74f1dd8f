"""When a run saves, and how long that holds it up.

A save is begun at a step boundary and settled at a later one. In between a thread of each rank
writes a copy of the weights and moments, and training goes on. There is one save at a time. A
failed save is logged and dropped: the previous checkpoint remains valid, and training goes on,
until `checkpoint.max_failed_saves` have failed in a row.

[Note: saves and skipped steps]
The weights after a skipped step are those before it, so a stop there saves them like any others.
But they may be the reason for skipping, and a rollback must get behind the first step of the row.
So while training goes on, nothing is saved within a row. A checkpoint that a stop has left there
does not count towards `checkpoint.keep`, so the one from before the row stays. A rollback loads
that one and deletes those within the row.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.distributed.tensor import DTensor

from checkpoints import CheckpointError, Save, begin_save, commit_save, prune_checkpoints
from configs import flatten
from parallel import any_rank, are_finite
from training.hardware import host_memory_allows
from training.optimizer import training_tensors
from training.state import RECIPE_VERSIONS, Run, RunState
from training.stopping import NonFiniteError, SaveError

logger = logging.getLogger("microtron")


class _NotFiniteError(CheckpointError):
    """Weights that are not worth a checkpoint."""


class CheckpointWriter:
    """The saves of one launch; every rank calls each method at the same steps."""

    def __init__(self, run: Run, state: RunState) -> None:
        self.run = run
        self.saved_step = state.step
        self.pending: Save | None = None
        self.begun_at, self.held_s = 0.0, 0.0
        self.failure: CheckpointError | None = None  # of the newest save
        self.failed_step, self.failures_in_a_row = 0, 0
        self._last_good_step = state.last_good_step  # of the newest save

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # After an error: no thread of this run writes into its folder once the lock is gone.
        if self.pending is not None:
            self.pending.wait()

    def begin(self, state: RunState, *, background: bool) -> None:
        """Begin a checkpoint of this state, after the one under way; none within skipped steps."""
        if state.skipped_in_a_row == 0:
            self.commit_if_written(wait=True)
            self._begin(state, background=background)
            self.commit_if_written(wait=not background)

    def _begin(self, state: RunState, *, background: bool) -> None:
        run, self._last_good_step = self.run, state.last_good_step
        tensors = training_tensors(run.model, run.optimizer)
        num_bytes = sum(tensor.to_local().nbytes for tensor in tensors.values())
        if background and any_rank(run.mesh, not host_memory_allows(num_bytes)):
            logger.info(
                "step %d: no memory for copies of %.1f GiB, so training waits for this save",
                state.step,
                num_bytes / 2**30,
            )
            background = False
        contents: dict[str, Any] = {
            "progress": asdict(state),
            "config": flatten(run.config),
            "recipe_versions": RECIPE_VERSIONS,
            "text_fingerprint": run.corpus.text_fingerprint,
            "data_fingerprint": run.corpus.fingerprint,
            "tokenizer_fingerprint": run.corpus.tokenizer.fingerprint,
        }
        self.begun_at = time.perf_counter()
        try:
            self._require_finite(state, tensors)
            self.pending = begin_save(
                run.folder.checkpoints,
                state.step,
                tensors,
                contents,
                run.mesh,
                background=background,
            )
        except CheckpointError as error:
            self._report_failure(state.step, error)
        self.held_s = time.perf_counter() - self.begun_at

    def commit_if_written(self, *, wait: bool = False) -> None:
        """Commit the save under way, if all ranks have written it; `wait` until they have.

        Raises SaveError on all ranks if too many saves have failed in a row.
        """
        if self.pending is not None:
            if not wait and any_rank(self.run.mesh, not self.pending.is_written):
                return
            self._commit()
            self.prune()
        if self.failures_in_a_row >= (allowed := self.run.config.checkpoint.max_failed_saves):
            raise SaveError(
                self.failed_step,
                self.saved_step,
                str(self.failure),
                f", {allowed} failed saves in a row (checkpoint.max_failed_saves={allowed})",
            )

    def _commit(self) -> None:
        """Wait until all ranks have written the save under way, and commit it."""
        if self.pending is None:
            return
        mesh, pending, self.pending = self.run.mesh, self.pending, None
        settling_at = time.perf_counter()
        try:
            directory = commit_save(pending, mesh)
        except CheckpointError as error:
            self._report_failure(pending.step, error)
            return
        now = time.perf_counter()
        self.saved_step, self.failure, self.failures_in_a_row = pending.step, None, 0
        logger.info(
            "saved %s in %.1f s, of which training waited %.2f s",
            directory,
            now - self.begun_at,
            self.held_s + now - settling_at,
        )

    def prune(self) -> None:
        """Delete old checkpoints, on rank 0."""
        if self.run.mesh.world.rank == 0:
            keep = self.run.config.checkpoint.keep
            prune_checkpoints(self.run.folder.checkpoints, keep=keep, up_to=self._last_good_step)

    def end(self, state: RunState) -> None:
        """Leave this state saved, without pruning; raises SaveError on all ranks if it cannot."""
        self._commit()
        if state.step > self.saved_step:
            self._begin(state, background=False)
            self._commit()
        if isinstance(self.failure, _NotFiniteError):
            raise NonFiniteError(state.step, "its weights or moments are not finite")
        if self.failure is not None:
            raise SaveError(state.step, self.saved_step, str(self.failure))

    def _require_finite(self, state: RunState, tensors: Mapping[str, DTensor]) -> None:
        """A run that went back to such weights could not go on from them."""
        is_finite = are_finite([tensor.to_local() for tensor in tensors.values()])
        if any_rank(self.run.mesh, not is_finite):
            raise _NotFiniteError(f"step {state.step} has weights or moments that are not finite")

    def _report_failure(self, step: int, error: CheckpointError) -> None:
        self.failure, self.failed_step = error, step
        # Weights that are not finite are for the rollback that follows, not for the disk.
        self.failures_in_a_row += not isinstance(error, _NotFiniteError)
        if self.run.mesh.world.rank == 0:
            logger.error("%s; the checkpoint before it stands", error)
