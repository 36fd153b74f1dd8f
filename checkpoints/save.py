"""Atomic saves, in the foreground or in the background, and deletion of old checkpoints.

[Note: commit]
Each rank writes and fsyncs its file in a hidden temporary directory. When all have reported
success, rank 0 adds the manifest. One rename turns the directory into a checkpoint, and only then
are older checkpoints deleted; each is first renamed, so that a half-deleted one does not look like
a checkpoint. A kill at any moment leaves only intact checkpoints, and hidden directories that the
next start removes. Only real directories with a manifest are deleted, never links.

[Note: background saves]
Training continues while files are written: the tensors are copied first, and a thread on each rank
writes the copies. The thread does not communicate; the main threads commit, between steps. A rank
that fails reports that instead of raising, because its peers would wait for it forever.

Only the holder of the run folder's lock may call these functions. All ranks must see the same file
system.
"""

import itertools
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    checkpoint_directories,
    describe_file,
    fsync,
    step_directory,
    step_of,
    write_manifest,
)
from configs import os_error_text
from parallel import LocalShard, Mesh, gather_json, move_to

logger = logging.getLogger("microtron")

_TEMPORARY, _DELETED = ".tmp-", ".del-"


@dataclass(frozen=True)
class Save:
    """A checkpoint that all ranks have begun to write and that is not committed yet."""

    step: int
    folder: Path
    temporary: Path
    state: dict[str, Any]
    writing: "Future[dict[str, Any]]"  # the description of this rank's file

    @property
    def is_written(self) -> bool:
        """Whether this rank's file is complete, or has failed."""
        return self.writing.done()

    def wait(self) -> dict[str, Any]:
        """Wait for this rank's file; returns its description, or the failure."""
        error = self.writing.exception()
        if isinstance(error, Exception):
            return {"failure": f"cannot write in {self.temporary}: {type(error).__name__}: {error}"}
        return self.writing.result()


def begin_save(
    folder: Path,
    step: int,
    tensors: Mapping[str, LocalShard],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    background: bool,
) -> Save:
    """Begin the checkpoint of `step` on every rank; `state` is JSON.

    Returns when the tensors are copied (`background`) or written. Raises CheckpointError on all
    ranks if rank 0 cannot create the directory.
    """
    temporary = folder / f"{_TEMPORARY}{step_directory(folder, step).name}"
    problem = _make_empty(temporary) if mesh.world.rank == 0 else None
    if problem := gather_json(mesh, problem)[0]:
        raise CheckpointError(f"cannot save step {step}: {problem}")
    path = temporary / f"rank_{mesh.world.rank:05d}.safetensors"
    local, shards = _local_shards(tensors, mesh, copy=background)
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
    writing = writer.submit(_write_file, path, local, shards)
    writer.shutdown(wait=not background)
    return Save(step, folder, temporary, state, writing)


def commit_save(save: Save, mesh: Mesh) -> Path:
    """Wait until all ranks have written, and make it a checkpoint; every rank calls this.

    Raises CheckpointError on all ranks if any of them failed; earlier checkpoints are untouched.
    """
    reports = gather_json(mesh, save.wait())
    directory = step_directory(save.folder, save.step)
    failures = [
        f"rank {rank} {report['failure']}"
        for rank, report in enumerate(reports)
        if "failure" in report
    ]
    if mesh.world.rank == 0:
        try:
            if not failures:
                _commit(save, directory, reports)
        except OSError as error:
            failures = [f"rank 0 cannot commit: {error}"]
        if failures:  # free the space: these files may be what filled the disk
            shutil.rmtree(save.temporary, ignore_errors=True)
    if failures := gather_json(mesh, failures)[0]:
        raise CheckpointError(f"cannot save step {save.step}: {'; '.join(failures)}")
    return directory


def prune_checkpoints(folder: Path, *, keep: int, up_to: int) -> None:
    """Delete all but the `keep` newest (0: keep all) of the checkpoints up to a step; rank 0 only.

    Later ones are damaged or follow a skipped step; they are neither counted nor deleted.
    """
    if keep > 0:
        _delete(_own_checkpoints(folder, 0, up_to)[:-keep])


def delete_checkpoints(folder: Path, *, after: int, up_to: int) -> None:
    """Delete the checkpoints of the steps in (after, up_to]; rank 0 only."""
    _delete(_own_checkpoints(folder, after + 1, up_to))


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed save or deletion left; rank 0 only."""
    hidden = (path for prefix in (_TEMPORARY, _DELETED) for path in folder.glob(f"{prefix}step_*"))
    _delete([path for path in hidden if _is_real_directory(path)])


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _own_checkpoints(folder: Path, first: int, last: int) -> list[Path]:
    """The checkpoints of the steps from `first` to `last` that a run may have written itself."""
    return [
        path
        for path in checkpoint_directories(folder)
        if first <= step_of(path) <= last
        and _is_real_directory(path)
        and os.path.isfile(path / MANIFEST)  # False without permission, where Path.is_file raises
    ]


def _delete(directories: list[Path]) -> None:
    for path in directories:
        try:
            is_hidden = path.name.startswith((_TEMPORARY, _DELETED))
            shutil.rmtree(path if is_hidden else path.rename(path.with_name(_DELETED + path.name)))
        except OSError as error:
            logger.warning("cannot delete %s: %s", path, os_error_text(error))


def _local_shards(
    tensors: Mapping[str, LocalShard], mesh: Mesh, *, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that this rank writes, in host memory, and their manifest entries."""
    local, shards = {}, {}
    for name, tensor in tensors.items():
        shard = tensor.tensor
        is_copy = tensor.tp_dim is None and mesh.tp.rank > 0  # rank 0 of the axis writes it
        is_copy |= tensor.is_tied and mesh.pp.rank > 0
        is_copy |= mesh.replicas.rank > 0
        if is_copy or shard.numel() == 0:
            continue
        on_host = move_to(shard, "cpu").contiguous()
        is_shared = on_host.data_ptr() == shard.data_ptr()  # False if copied from a GPU
        local[name] = on_host.clone() if copy and is_shared else on_host
        shards[name] = {
            "global_shape": list(tensor.global_shape),
            "dtype": str(shard.dtype).removeprefix("torch."),
            "offsets": [part.start for part in tensor.slices],
            "shape": list(shard.shape),
        }
    return local, shards


def _make_empty(directory: Path) -> str | None:
    """Create an empty directory; return the problem, such as a link of that name."""
    try:
        if os.path.lexists(directory):
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
    except OSError as error:
        return f"cannot create {directory}: {os_error_text(error)}"
    return None


def _write_file(path: Path, tensors: dict[str, Tensor], shards: dict[str, Any]) -> dict[str, Any]:
    save_file(tensors, path)
    fsync(path)
    return describe_file(path, shards)


def _commit(save: Save, directory: Path, descriptions: list[dict[str, Any]]) -> None:
    """Write the manifest and rename the directory into place."""
    write_manifest(save.temporary, save.step, save.state, descriptions)
    if os.path.lexists(directory):  # a damaged checkpoint, or something else: keep it aside
        names = (directory.with_name(f"damaged_{directory.name}_{n}") for n in itertools.count(1))
        directory.rename(next(path for path in names if not os.path.lexists(path)))
    save.temporary.rename(directory)
    fsync(directory.parent)
