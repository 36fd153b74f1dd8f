"""Finding the newest whole checkpoint, and reading it into today's layout.

For each local shard that today's layout wants, the overlapping pieces of the stored shards are
read, so resuming on another number of ranks is no special case. No rank reads more than it keeps.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from checkpoints.manifest import (
    Checkpoint,
    CheckpointError,
    checkpoint_directories,
    foreign_entries,
    read_manifest,
    step_directory,
    verify_file,
)
from parallel import Mesh, gather_json, local_part

_MAPPED_BYTES = 256 << 20  # read of mapped files until they are closed

logger = logging.getLogger("microtron")


def find_checkpoint(
    folder: Path, mesh: Mesh, step: int | None = None, *, up_to: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole; None if there are none at all.

    Every rank calls this; the files are verified in shares. A damaged checkpoint is named and
    passed over. Raises CheckpointError if there are checkpoints and all of them are damaged:
    starting from scratch is for a person to decide. With a `step` that one is meant, and it is an
    error if it is damaged or not there. Later ones than `up_to` are as if not there.
    """
    names = _listed(folder, mesh, up_to)
    if step is not None:
        names = [_of_step(step, folder, names)]
    for name in names:
        problems = [found for found in gather_json(mesh, _problem(folder / name, mesh)) if found]
        if not problems:
            return read_manifest(folder / name)
        if step is not None:
            raise CheckpointError(f"checkpoint {folder / name} is damaged: {problems[0]}")
        if mesh.world.rank == 0:
            logger.warning("checkpoint %s is damaged, passed over: %s", folder / name, problems[0])
    if names:
        raise CheckpointError(
            f"all {len(names)} checkpoints in {folder} are damaged; "
            "move them away to start from scratch"
        )
    return None


def _listed(folder: Path, mesh: Mesh, up_to: int | None) -> list[str]:
    """The names of the checkpoints, newest first: the same on all ranks, whatever each one sees."""
    if mesh.world.rank == 0:
        for path in foreign_entries(folder):
            logger.warning("%s is not a directory, ignored", path)
    last = None if up_to is None else step_directory(folder, up_to)
    directories = reversed(checkpoint_directories(folder))
    names = [path.name for path in directories if last is None or path <= last]
    result: list[str] = gather_json(mesh, names)[0]
    return result


def _of_step(step: int, folder: Path, names: list[str]) -> str:
    name = step_directory(folder, step).name
    if name not in names:
        steps = ", ".join(str(int(other.removeprefix("step_"))) for other in reversed(names))
        raise CheckpointError(
            f"there is no checkpoint of step {step} in {folder}; "
            f"{f'there are those of steps {steps}' if names else 'there is none at all'}"
        )
    return name


def _problem(directory: Path, mesh: Mesh) -> str | None:
    """What this rank's share of verifying finds wrong."""
    try:
        checkpoint = read_manifest(directory)
    except CheckpointError as error:
        return str(error)
    mine = sorted(checkpoint.files)[mesh.world.rank :: mesh.world.size]
    return next((found for name in mine if (found := verify_file(checkpoint, name))), None)


@torch.no_grad()
def load_tensors(
    checkpoint: Checkpoint,
    tensors: Mapping[str, DTensor],
    mesh: Mesh,
    *,
    prefix: str = "",
    converts: bool = False,
) -> None:
    """Fill the local shards of `tensors` from a verified checkpoint.

    Of the checkpoint's tensors those count whose names begin with `prefix`. Raises CheckpointError
    if names, shapes or (unless it `converts`) dtypes differ from theirs, or a part is missing.
    """
    _require_same_names(checkpoint, tensors, prefix)
    with _MappedFiles(checkpoint.directory) as files:
        for name, tensor in tensors.items():
            stored = checkpoint.tensors[name]
            dtype = stored["dtype"] if converts else str(tensor.dtype).removeprefix("torch.")
            ours = (list(tensor.shape), dtype)
            if ours != (stored["shape"], stored["dtype"]):
                raise CheckpointError(
                    f"{checkpoint.directory}: {name} is {stored['dtype']} {stored['shape']}, "
                    f"the model has {ours[1]} {ours[0]}"
                )
            local = tensor.to_local()
            wanted = local_part(tensor, mesh)
            filled = 0
            for shard in stored["shards"]:
                source, target = _overlap(wanted, shard["offsets"], shard["shape"])
                if target is None:
                    continue
                if shard["file"] not in checkpoint.files:
                    raise CheckpointError(
                        f"{checkpoint.directory}: {name} is in {shard['file']}, not verified"
                    )
                piece = files.of(shard["file"]).get_slice(name)[source]
                local[target].copy_(piece)
                filled += piece.numel()
                files.count(piece.nbytes)
                del piece
            if filled != local.numel():
                raise CheckpointError(
                    f"{checkpoint.directory}: {name} has {filled} of the "
                    f"{local.numel()} elements wanted"
                )


class _MappedFiles:
    """Files of a checkpoint, opened as they are asked for.

    Opening one reads the names of all its tensors, so they stay open; but what was read of a mapped
    file counts as memory until it is closed, so after much reading all are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._read_bytes = 0

    def __enter__(self) -> "_MappedFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, name: str) -> Any:
        """The open file of a name."""
        if self._read_bytes > _MAPPED_BYTES:
            self._files.clear()
            self._stack.close()
            self._read_bytes = 0
        if name not in self._files:
            file = safe_open(self._directory / name, "pt")
            self._files[name] = self._stack.enter_context(file)
        return self._files[name]

    def count(self, num_bytes: int) -> None:
        """So much was read."""
        self._read_bytes += num_bytes


def _require_same_names(
    checkpoint: Checkpoint, tensors: Mapping[str, DTensor], prefix: str
) -> None:
    stored = {name for name in checkpoint.tensors if name.startswith(prefix)}
    missing = sorted(set(tensors) - stored)
    unknown = sorted(stored - set(tensors))
    if missing or unknown:
        raise CheckpointError(
            f"{checkpoint.directory} is of another model: "
            f"lacks {missing[:3]}, has unknown {unknown[:3]}"
        )


def _overlap(
    wanted: tuple[slice, ...], offsets: list[int], shape: list[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...] | None]:
    """Where `wanted` and a stored shard meet: as slices of the shard, and of the wanted part.

    The second is None where they do not meet.
    """
    source, target = [], []
    for want, offset, size in zip(wanted, offsets, shape, strict=True):
        start, stop = max(want.start, offset), min(want.stop, offset + size)
        if start >= stop:
            return (), None
        source.append(slice(start - offset, stop - offset))
        target.append(slice(start - want.start, stop - want.start))
    return tuple(source), tuple(target)
