"""Finding the newest whole checkpoint, and reading it into today's layout.

[Note: beside a run]
A run deletes its old checkpoints. Programs that read them meanwhile hold the one they have found:
its files are opened at once, and stay readable until they are closed. One that vanishes before that
is not damaged, and the newest of those that are there now is taken.

For each local shard that today's layout wants, the overlapping pieces of the stored shards are
read, so resuming on another number of ranks is no special case. No rank reads more than it keeps.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
# A network file system may list for a while what another host has deleted.
_LOOKS_AT_VANISHED, _LOOK_EVERY_S = 300, 0.1

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
    return _find(folder, mesh, step, up_to, prefix="", stack=None)


@contextmanager
def held_checkpoint(
    folder: Path, mesh: Mesh, step: int | None = None, *, prefix: str = ""
) -> Iterator[Checkpoint | None]:
    """As `find_checkpoint`, readable until the end of the block whatever a run deletes meanwhile.

    Of its tensors only those are verified whose names begin with `prefix`.
    """
    with ExitStack() as stack:
        yield _find(folder, mesh, step, None, prefix=prefix, stack=stack)


def _find(
    folder: Path,
    mesh: Mesh,
    step: int | None,
    up_to: int | None,
    *,
    prefix: str,
    stack: ExitStack | None,
) -> Checkpoint | None:
    damaged: set[str] = set()
    vanished: Counter[str] = Counter()
    while (name := _candidate(folder, mesh, step, up_to, damaged)) is not None:
        checkpoint, problem = _examine(folder / name, mesh, prefix, stack)
        if checkpoint is not None:
            return checkpoint
        if problem is None and vanished[name] < _LOOKS_AT_VANISHED:
            vanished[name] += 1
            time.sleep(_LOOK_EVERY_S)
            continue
        problem = problem or "some ranks do not see it"
        if step is not None:
            raise CheckpointError(f"checkpoint {folder / name} is damaged: {problem}")
        if mesh.world.rank == 0:
            logger.warning("checkpoint %s is damaged, passed over: %s", folder / name, problem)
        damaged.add(name)
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints in {folder} are damaged; "
            "move them away to start from scratch"
        )
    return None


def _candidate(
    folder: Path, mesh: Mesh, step: int | None, up_to: int | None, damaged: set[str]
) -> str | None:
    """The name of the next checkpoint to examine, of those that are there now."""
    names = _listed(folder, mesh, up_to)
    if step is not None:
        names = [_of_step(step, folder, names)]
    return next((name for name in names if name not in damaged), None)


def _examine(
    directory: Path, mesh: Mesh, prefix: str, stack: ExitStack | None
) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint if it is whole, else what is wrong with it; neither if it has vanished.

    All ranks come to the same result, each of a share of the files.
    """
    with ExitStack() as opened:
        checkpoint, problem = None, None
        try:
            checkpoint = read_manifest(directory)
            if stack is not None:
                checkpoint = checkpoint.hold(opened)
            mine = sorted(checkpoint.files)[mesh.world.rank :: mesh.world.size]
            found = (verify_file(checkpoint, name, prefix) for name in mine)
            problem = next((text for text in found if text), None)
        except CheckpointError as error:
            problem = str(error)
        is_gone = problem is not None and not directory.exists()
        reports = gather_json(mesh, [problem, is_gone])
        if any(is_gone for _, is_gone in reports):
            return None, None
        if problem := next((text for text, _ in reports if text is not None), None):
            return None, problem
        if stack is not None:
            stack.push(opened.pop_all())
    return checkpoint, None


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
    with _MappedFiles(checkpoint) as files:
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

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
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
            file = safe_open(self._checkpoint.path(name), "pt")
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
