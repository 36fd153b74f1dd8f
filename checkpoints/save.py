"""Writing a checkpoint so that it is there whole or not at all.

[Note: commit]
Everything is written into a hidden temporary directory: each rank's file, fsynced, then, once all
ranks have reported theirs, the manifest. One rename makes it a checkpoint. A kill before the rename
leaves a temporary directory, which the next start sweeps; a kill after it leaves a whole
checkpoint. Older ones are deleted only then, renamed first so that a half-deleted one has no
checkpoint's name. Only real directories with a manifest are deleted: links, files and directories
that somebody else has given such a name stay. A failed deletion is a warning.

[Note: in the background]
Training may go on while files are written: what it would change is copied first, and a thread of
each rank writes the copy. The thread talks to nobody. All that ranks do together, creating the
directory, reporting and committing, is done by their main threads, between steps.

A rank that fails (a full disk) reports that instead of raising, or its peers would wait for it for
ever. Only the holder of the run folder's lock may call this, so no two writers share a directory.
All ranks must see the same file system.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    checkpoint_directories,
    file_checksums,
    fsync,
    step_directory,
    write_manifest,
)
from configs import os_error_text
from parallel import Mesh, any_rank, gather_json, local_slices, move_to, tp_shard_dim

logger = logging.getLogger("microtron")

_TEMPORARY, _DELETED = ".tmp-", ".del-"


@dataclass(frozen=True)
class Save:
    """A checkpoint that all ranks have begun to write and that is not there yet."""

    step: int
    folder: Path
    temporary: Path
    state: dict[str, Any]
    report: "Future[dict[str, Any]]"  # what the manifest says of this rank's file, or the failure

    @property
    def is_written(self) -> bool:
        """Whether this rank's file is done, or has failed."""
        return self.report.done()

    def wait(self) -> dict[str, Any]:
        """Wait for this rank's file; returns what the manifest says of it, or the failure."""
        error = self.report.exception()
        if isinstance(error, Exception):
            return {"failure": f"cannot write: {error!r}"}
        return self.report.result()


def begin_save(
    folder: Path,
    step: int,
    tensors: Mapping[str, DTensor],
    state: dict[str, Any],
    mesh: Mesh,
    *,
    background: bool,
) -> Save:
    """Begin the checkpoint of `step`: the tensors and the state (JSON); every rank calls this.

    In the background returns once the tensors are copied, else once they are written. Raises
    CheckpointError on all ranks if nothing can be written here.
    """
    temporary = folder / f"{_TEMPORARY}{step_directory(folder, step).name}"
    _on_rank_0(mesh, "cannot create", lambda: _make_empty(temporary))
    path = temporary / f"rank_{mesh.world.rank:05d}.safetensors"
    mine, shards = _local_shards(tensors, mesh, copy=background)
    writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
    report = writer.submit(_write_file, path, mine, shards)
    writer.shutdown(wait=not background)
    return Save(step, folder, temporary, state, report)


def commit_save(save: Save, mesh: Mesh) -> Path:
    """Wait for all ranks to have written, and make it a checkpoint; every rank calls this.

    Raises CheckpointError on all ranks if any rank could not write; what was there before is then
    still there.
    """
    reports = gather_json(mesh, save.wait())
    failures = [
        f"rank {rank} {report['failure']}"
        for rank, report in enumerate(reports)
        if "failure" in report
    ]
    directory = step_directory(save.folder, save.step)
    try:
        if failures:
            raise CheckpointError(f"cannot save step {save.step}: {'; '.join(failures)}")
        _on_rank_0(
            mesh,
            "cannot commit",
            lambda: _commit(save.temporary, directory, save.step, save.state, reports),
        )
    except CheckpointError:
        # It may be what fills the disk. All ranks are here.
        _on_rank_0(mesh, "cannot remove", lambda: shutil.rmtree(save.temporary, ignore_errors=True))
        raise
    return directory


def prune_checkpoints(folder: Path, *, keep: int, up_to: int) -> None:
    """Delete all but the `keep` newest (0: all stay) of the checkpoints up to a step.

    A later one is damaged, or of a row of bad steps, and must not count as one of those kept. Call
    it on one rank, holding the lock.
    """
    if keep > 0:
        for directory in _own_checkpoints(folder, 0, up_to)[:-keep]:
            _delete(directory)


def delete_checkpoints(folder: Path, *, after: int, up_to: int) -> None:
    """Delete those of the steps in (after, up_to]. Call it on one rank, holding the lock."""
    for directory in _own_checkpoints(folder, after + 1, up_to):
        _delete(directory)


def sweep_leftovers(folder: Path) -> None:
    """Remove what a killed save or deletion left. Call it on one rank, holding the lock."""
    for prefix in (_TEMPORARY, _DELETED):
        for leftover in folder.glob(f"{prefix}step_*"):
            if _is_real_directory(leftover):
                _remove(leftover)


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _own_checkpoints(folder: Path, first: int, last: int) -> list[Path]:
    """The checkpoints of the steps from `first` to `last` that a run may have written itself."""
    return [
        path
        for path in checkpoint_directories(folder)
        if step_directory(folder, first) <= path <= step_directory(folder, last)
        and _is_real_directory(path)
        and os.path.isfile(path / MANIFEST)  # False, where Path raises, if it may not be read
    ]


def _delete(directory: Path) -> None:
    deleted = directory.with_name(f"{_DELETED}{directory.name}")
    try:
        directory.rename(deleted)
    except OSError as error:
        logger.warning("cannot delete checkpoint %s: %s", directory, os_error_text(error))
    else:
        _remove(deleted)


def _remove(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("cannot remove %s: %s", directory, os_error_text(error))


def _on_rank_0(mesh: Mesh, what: str, action: Any) -> None:
    """Do something on rank 0; every rank returns when it is done, or raises if it failed."""
    failure = None
    if mesh.world.rank == 0:
        try:
            action()
        except OSError as error:
            failure = f"{what} a checkpoint: {error}"
    if any_rank(mesh, failure is not None):
        raise CheckpointError(failure or f"rank 0 {what} a checkpoint; its log says why")


def _make_empty(directory: Path) -> None:
    if _is_real_directory(directory):
        shutil.rmtree(directory)
    directory.mkdir(parents=True)


def _local_shards(
    tensors: Mapping[str, DTensor], mesh: Mesh, *, copy: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What this rank writes, in the memory of the host, and what the manifest says about it."""
    mine, shards = {}, {}
    for name, tensor in tensors.items():
        tp_dim = tp_shard_dim(tensor)
        local = tensor.to_local().detach()
        if (tp_dim is None and mesh.tp.rank > 0) or local.numel() == 0:
            continue  # another tp rank has the same and writes it
        slices = local_slices(tensor.shape, tp_dim, mesh.tp, mesh.dp)
        on_host = move_to(local, "cpu").contiguous()
        # A copy of a GPU's tensor is one already.
        mine[name] = on_host.clone() if copy and on_host.data_ptr() == local.data_ptr() else on_host
        shards[name] = {
            "global_shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "offsets": [part.start for part in slices],
            "shape": list(local.shape),
        }
    return mine, shards


def _write_file(path: Path, mine: dict[str, Tensor], shards: dict[str, Any]) -> dict[str, Any]:
    """Write this rank's file; returns what the manifest says about it, or the failure."""
    try:
        save_file(mine, path)
        fsync(path)
        file, checksums = file_checksums(path)
        shards = {name: {**shard, "checksum": checksums[name]} for name, shard in shards.items()}
        return {"name": path.name, "file": file, "shards": shards}
    except (OSError, SafetensorError) as error:
        return {"failure": f"cannot write {path}: {error}"}


def _commit(
    temporary: Path,
    directory: Path,
    step: int,
    state: dict[str, Any],
    reports: list[dict[str, Any]],
) -> None:
    """Write the manifest from all ranks' reports and rename the directory into place."""
    files = {report["name"]: report["file"] for report in reports}
    tensors: dict[str, Any] = {}
    for report in reports:
        for name, shard in report["shards"].items():
            entry = tensors.setdefault(
                name, {"shape": shard["global_shape"], "dtype": shard["dtype"], "shards": []}
            )
            piece = {key: shard[key] for key in ("offsets", "shape", "checksum")}
            entry["shards"].append({"file": report["name"], **piece})
    write_manifest(temporary, step, state, tensors, files)
    if os.path.lexists(directory):
        # Only a damaged one is ever saved again, or the name is taken by something else. It is
        # kept, out of the way.
        aside = next(
            path
            for number in range(1, 10**6)
            if not os.path.lexists(
                path := directory.with_name(f"damaged_{directory.name}_{number}")
            )
        )
        directory.rename(aside)
    temporary.rename(directory)
    fsync(directory.parent)
