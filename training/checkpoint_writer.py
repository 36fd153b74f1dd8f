"""The saves of a run.

A save begins at a step boundary and is committed at a later one. Meanwhile a thread of each rank
writes a copy of the weights and moments, and training continues. There is one save at a time. A
failed save is logged and dropped, and the previous checkpoint remains valid; the run ends after
`checkpoint.max_failed_saves` consecutive failures.

[Note: saves and skipped steps]
A skipped step leaves the weights unchanged, but they may be the reason for skipping. So only a stop
saves after a skipped step; that checkpoint does not count towards `checkpoint.keep`, and a rollback
deletes it and loads the one from before the skipped steps.
"""

import logging
import time
from dataclasses import asdict
from typing import Any

from checkpoints import CheckpointError, Save, begin_save, commit_save, prune_checkpoints
from configs import flatten
from parallel import any_rank, are_finite
from training.divergence import NonFiniteError
from training.hardware import hardware_record, host_memory_allows
from training.optimizer import training_tensors
from training.run_folder import FatalError
from training.state import RECIPE_VERSIONS, Run, RunState

logger = logging.getLogger("microtron")


class SaveError(FatalError):
    """The last save, or several consecutive ones, failed."""

    exit_code = 1


class _NotFiniteError(CheckpointError):
    """Weights that must not be saved."""


class CheckpointWriter:
    """The saves of one launch; every rank calls each method at the same steps."""

    def __init__(self, run: Run, state: RunState) -> None:
        self.run = run
        run.folder.saved_step = state.step
        self.pending: Save | None = None
        self._begun_at, self._blocked_s = 0.0, 0.0
        self._failure: CheckpointError | None = None  # of the newest save
        self._failed_step, self._consecutive_failures = 0, 0
        self._last_good_step = state.last_good_step  # of the newest save

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # Even after an error, no thread may write into the folder once it is unlocked.
        if self.pending is not None:
            self.pending.wait()

    def begin(self, state: RunState, *, background: bool) -> None:
        """Save this state, after the previous save; do nothing after a skipped step."""
        if state.skipped_in_a_row == 0:
            self.commit_if_written(wait=True)
            self._begin(state, background=background)
            self.commit_if_written(wait=not background)

    def commit_if_written(self, *, wait: bool = False) -> None:
        """Commit the pending save if all ranks have written it; `wait` until they have.

        Raises SaveError on all ranks after too many consecutive failures.
        """
        if self.pending is not None:
            if not wait and any_rank(self.run.mesh, not self.pending.is_written):
                return
            self._commit()
            self.prune()
        limit = self.run.config.checkpoint.max_failed_saves
        if self._consecutive_failures >= limit:
            after = f" after {limit} consecutive failed saves (checkpoint.max_failed_saves={limit})"
            raise self._save_error(self._failed_step, after)

    def end(self, state: RunState) -> None:
        """Save this state without pruning; raise SaveError on all ranks if that fails."""
        self._commit()
        if state.step > self.run.folder.saved_step:
            self._begin(state, background=False)
            self._commit()
        if isinstance(self._failure, _NotFiniteError):
            problem = "its weights or moments are not finite"
            raise NonFiniteError(state.step, problem, has_checkpoint=self.run.folder.saved_step > 0)
        if self._failure is not None:
            raise self._save_error(state.step)

    def prune(self) -> None:
        """Delete old checkpoints, on rank 0."""
        if self.run.mesh.world.rank == 0:
            keep = self.run.config.checkpoint.keep
            prune_checkpoints(self.run.folder.checkpoints, keep=keep, up_to=self._last_good_step)

    def _begin(self, state: RunState, *, background: bool) -> None:
        run, self._last_good_step = self.run, state.last_good_step
        tensors = training_tensors(run.model, run.optimizer)
        local = [shard.tensor for shard in tensors.values()]
        num_bytes = sum(tensor.nbytes for tensor in local)
        if background and any_rank(run.mesh, not host_memory_allows(num_bytes)):
            message = "step %d: training waits for this save: %.1f GiB is much of the free memory"
            logger.info(message, state.step, num_bytes / 2**30)
            background = False
        contents: dict[str, Any] = {
            "progress": asdict(state),
            "config": flatten(run.config),
            "recipe_versions": RECIPE_VERSIONS,
            **hardware_record(run.mesh, run.precision),
            "text_fingerprint": run.corpus.text_fingerprint,
            "data_fingerprint": run.corpus.fingerprint,
            "tokenizer_fingerprint": run.corpus.tokenizer.fingerprint,
        }
        self._begun_at = time.perf_counter()
        try:
            # A rollback to such weights could not continue from them.
            if any_rank(run.mesh, not are_finite(local)):
                raise _NotFiniteError(f"step {state.step}: weights or moments are not finite")
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
        self._blocked_s = time.perf_counter() - self._begun_at

    def _commit(self) -> None:
        """Wait until all ranks have written the pending save, and commit it."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        committing_at = time.perf_counter()
        try:
            directory = commit_save(pending, self.run.mesh)
        except CheckpointError as error:
            self._report_failure(pending.step, error)
            return
        now = time.perf_counter()
        self.run.folder.saved_step = pending.step
        self._failure, self._consecutive_failures = None, 0
        logger.info(
            "saved %s in %.1f s (blocked training for %.2f s)",
            directory,
            now - self._begun_at,
            self._blocked_s + now - committing_at,
        )

    def _report_failure(self, step: int, error: CheckpointError) -> None:
        self._failure, self._failed_step = error, step
        # Weights that are not finite lead to a rollback; the disk is not to blame.
        self._consecutive_failures += not isinstance(error, _NotFiniteError)
        if self.run.mesh.world.rank == 0:
            logger.error("%s; the previous checkpoint remains valid", error)

    def _save_error(self, step: int, after: str = "") -> SaveError:
        return SaveError(
            f"step {step} is not saved{after}: {self._failure}; fix the cause, then resume from "
            f"step {self.run.folder.saved_step}"
        )
