"""Finding the newest intact checkpoint, and reading it on any layout.

[Note: concurrent pruning]
A run deletes its old checkpoints. Programs that read one meanwhile hold it: they open all its files
at once, and open files stay readable. If a checkpoint vanishes before that, the search starts over.

Each rank reads the parts of the stored shards that overlap its own shards, so loading on another
number of ranks is no special case.
"""

import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoints.manifest import (
    Checkpoint,
    CheckpointError,
    checkpoint_directories,
    read_header,
    read_manifest,
    step_directory,
    step_entries,
    step_of,
    tensor_ranges,
    verify_file,
)
from configs import UserError
from parallel import LocalShard, Mesh, gather_json

_CHUNK_BYTES = 16 << 20
# A network file system may still list what another host has deleted.
_MAX_RETRIES, _RETRY_INTERVAL_S = 300, 0.1

Slices = tuple[slice, ...]

logger = logging.getLogger("microtron")


def find_checkpoint(
    folder: Path,
    mesh: Mesh,
    step: int | None = None,
    *,
    up_to: int | None = None,
    prefix: str = "",
    hold_until: ExitStack | None = None,
) -> Checkpoint | None:
    """Find the newest intact checkpoint up to step `up_to`, or that of `step`; None if none exists.

    Every rank calls this and verifies a share of the files, but only tensors whose names begin with
    `prefix`. Files stay open until `hold_until` closes, if given. Damaged checkpoints are skipped
    with a warning. Raises CheckpointError if all are damaged, because starting from scratch is the
    user's decision, or if the checkpoint of `step` is damaged or missing.
    """
    damaged: set[str] = set()
    retries: Counter[str] = Counter()
    while names := [n for n in _list(folder, mesh, step, up_to) if n not in damaged]:
        directory = folder / names[0]
        with ExitStack() as stack:
            checkpoint, problem = _verify(directory, mesh, prefix, stack if hold_until else None)
            if checkpoint is not None:
                if hold_until is not None:
                    hold_until.push(stack.pop_all())
                return checkpoint
        if problem is None and retries[directory.name] < _MAX_RETRIES:
            retries[directory.name] += 1
            time.sleep(_RETRY_INTERVAL_S)
            continue
        problem = problem or "some ranks do not see it"
        if step is not None:
            raise CheckpointError(f"checkpoint {directory} is damaged: {problem}")
        if mesh.world.rank == 0:
            logger.warning("checkpoint %s is damaged, skipped: %s", directory, problem)
        damaged.add(directory.name)
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints in {folder} are damaged; "
            "move them away to start from scratch"
        )
    return None


@contextmanager
def held_checkpoint(
    folder: Path, mesh: Mesh, step: int | None = None, *, prefix: str = ""
) -> Iterator[Checkpoint | None]:
    """`find_checkpoint`, readable inside the block even if the run deletes it."""
    with ExitStack() as stack:
        yield find_checkpoint(folder, mesh, step, prefix=prefix, hold_until=stack)


def _list(folder: Path, mesh: Mesh, step: int | None, up_to: int | None) -> list[str]:
    """The names of the checkpoints that rank 0 sees, newest first, on every rank."""
    found = checkpoint_directories(folder)
    if mesh.world.rank == 0:
        for path in sorted({*step_entries(folder)} - {*found}):
            logger.warning("%s is not a directory, ignored", path)
    names = [path.name for path in reversed(found) if up_to is None or step_of(path) <= up_to]
    names = gather_json(mesh, names)[0]
    if step is None:
        return names
    name = step_directory(folder, step).name
    if name not in names:
        steps = ", ".join(str(step_of(folder / other)) for other in reversed(names))
        raise CheckpointError(
            f"there is no checkpoint of step {step} in {folder}; "
            f"{f'there are checkpoints of steps {steps}' if names else 'there are none at all'}"
        )
    return [name]


def _verify(
    directory: Path, mesh: Mesh, prefix: str, stack: ExitStack | None
) -> tuple[Checkpoint | None, str | None]:
    """Return an intact checkpoint or a problem, on all ranks; neither if it has vanished.

    Raises UserError, on all ranks, if one of them cannot open enough files.
    """
    checkpoint, problem, limit = None, None, None
    try:
        checkpoint = read_manifest(directory)
        if stack is not None:
            checkpoint = checkpoint.hold(stack)
        for name in sorted(checkpoint.files)[mesh.world.rank :: mesh.world.size]:
            verify_file(checkpoint, name, prefix)
    except CheckpointError as error:
        problem = str(error)
    except UserError as error:
        limit = str(error)
    is_gone = problem is not None and not directory.exists()
    reports = gather_json(mesh, [problem, limit, is_gone])
    limit = next((text for _, text, _ in reports if text is not None), None)
    if limit is not None:
        raise UserError(f"{directory}: {limit}")
    if any(is_gone for *_, is_gone in reports):
        return None, None
    problem = next((text for text, *_ in reports if text is not None), None)
    return (checkpoint, None) if problem is None else (None, problem)


def require_fingerprint(checkpoint: Checkpoint, what: str, fingerprint: str) -> None:
    """Raise UserError if the tokenizer or the data is not the checkpoint's."""
    stored = checkpoint.state[f"{what}_fingerprint"]
    if stored not in (fingerprint, None):  # None: an imported model, whose data is unknown
        raise UserError(
            f"the {what} is not the one that {checkpoint.directory} was trained with (fingerprint "
            f"{fingerprint}, was {stored}); restore it"
        )


@torch.no_grad()
def load_tensors(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LocalShard],
    *,
    prefix: str = "",
    converts: bool = False,
    names: Collection[str] | None = None,
) -> None:
    """Fill the local shards of `tensors` from a verified checkpoint.

    `names`: the tensors of all ranks, if a rank has only some. Raises CheckpointError unless the
    stored tensors that begin with `prefix` have exactly these names, the same shapes and (unless it
    `converts`) dtypes.
    """
    stored_names = {name for name in checkpoint.tensors if name.startswith(prefix)}
    names = set(tensors if names is None else names)
    missing, unknown = sorted(names - stored_names), sorted(stored_names - names)
    if missing or unknown:
        raise CheckpointError(
            f"{checkpoint.directory} is of another model: "
            f"it lacks {missing[:3]} and has unknown {unknown[:3]}"
        )
    for name, tensor in tensors.items():
        stored = checkpoint.tensors[name]
        dtype = stored["dtype"] if converts else str(tensor.tensor.dtype).removeprefix("torch.")
        shape = list(tensor.global_shape)
        if (shape, dtype) != (stored["shape"], stored["dtype"]):
            raise CheckpointError(
                f"{checkpoint.directory}: {name} is {stored['dtype']} {stored['shape']}, "
                f"the model has {dtype} {shape}"
            )
    read_slices(checkpoint, {name: (t.tensor, t.slices) for name, t in tensors.items()})


def read_slices(checkpoint: Checkpoint, targets: Mapping[str, tuple[Tensor, Slices]]) -> None:
    """Fill each target with the given slices of the stored tensor of that name, file by file."""
    pieces: dict[str, list[tuple[str, dict[str, Any], Slices, Tensor]]] = defaultdict(list)
    for name, (target, wanted) in targets.items():
        num_found = 0
        for shard in checkpoint.tensors[name]["shards"]:
            if (overlap := _overlap(wanted, shard["offsets"], shard["shape"])) is not None:
                in_shard, in_target = overlap
                piece = target[in_target]
                pieces[shard["file"]].append((name, shard, in_shard, piece))
                num_found += piece.numel()
        if num_found != target.numel():
            raise CheckpointError(
                f"{checkpoint.directory}: {name} has {num_found} of the "
                f"{target.numel()} elements wanted"
            )
    for file_name, parts in pieces.items():
        with checkpoint.open(file_name) as file:
            ranges = tensor_ranges(read_header(file))
            for name, shard, in_shard, piece in parts:
                dtype = getattr(torch, checkpoint.tensors[name]["dtype"])
                _read_piece(file, ranges[name][0], shard["shape"], dtype, in_shard, piece)


def _read_piece(
    file: BinaryIO, begin: int, shape: list[int], dtype: torch.dtype, part: Slices, target: Tensor
) -> None:
    """Read `part` of the tensor stored at byte `begin` into `target`, a chunk of rows at a time."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, _CHUNK_BYTES // row_bytes)
    rows, *columns = part
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        file.seek(begin + first * row_bytes)
        data = bytearray((last - first) * row_bytes)
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise CheckpointError("a checkpoint file was truncated while it was read")
        chunk = torch.frombuffer(data, dtype=dtype).view(-1, *shape[1:])
        target[first - rows.start : last - rows.start].copy_(chunk[(slice(None), *columns)])


def _overlap(wanted: Slices, offsets: list[int], shape: list[int]) -> tuple[Slices, Slices] | None:
    """The overlap of `wanted` and a stored shard, as slices of the shard and of the target."""
    in_shard, in_target = [], []
    for want, offset, size in zip(wanted, offsets, shape, strict=True):
        start, stop = max(want.start, offset), min(want.stop, offset + size)
        if start >= stop:
            return None
        in_shard.append(slice(start - offset, stop - offset))
        in_target.append(slice(start - want.start, stop - want.start))
    return tuple(in_shard), tuple(in_target)
