"""Whole tensors, one at a time: for programs that make something of a checkpoint, or a checkpoint.

They hold no model. A tensor is read from whatever pieces some layout has left, and a file gets its
header first and then each tensor as it is made, so that no more than one is in memory.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints.manifest import (
    Checkpoint,
    CheckpointError,
    file_checksums,
    fsync,
    step_directory,
    write_manifest,
)

# What the format calls them.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8  # of the header, in bytes


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_full_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a verified checkpoint, in full; raises CheckpointError if a part is missing."""
    stored = checkpoint.tensors[name]
    whole = torch.empty(stored["shape"], dtype=getattr(torch, stored["dtype"]))
    filled = 0
    for shard in stored["shards"]:
        if shard["file"] not in checkpoint.files:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} is in {shard['file']}, which was not verified"
            )
        sides = zip(shard["offsets"], shard["shape"], strict=True)
        target = tuple(slice(offset, offset + size) for offset, size in sides)
        # Opened for each tensor: what has been read of a mapped file is memory until it is closed.
        with safe_open(checkpoint.path(shard["file"]), "pt") as file:
            piece = file.get_tensor(name)
            whole[target].copy_(piece)
            filled += piece.numel()
    if filled != whole.numel():
        raise CheckpointError(
            f"{checkpoint.directory}: {name} has {filled} of its {whole.numel()} elements"
        )
    return whole


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], make: Callable[[str], Tensor | None]
) -> None:
    """Write a safetensors file of these tensors, each made when its turn comes, and fsync it.

    None stands for zeros, which take no room on the disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.num_bytes
        header[name] = {
            "dtype": _DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            tensor = make(name)
            if tensor is None:
                file.seek(info.num_bytes, 1)
                continue
            assert tensor.shape == info.shape, f"{name}: {tuple(tensor.shape)} is not {info.shape}"
            data = tensor.to(info.dtype).contiguous().flatten().view(torch.uint8)
            file.write(data.numpy().data)
        file.truncate()  # to where it stands: zeros at the end are bytes too
    fsync(path)


def write_full_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    infos: Mapping[str, TensorInfo],
    make: Callable[[str], Tensor | None],
) -> None:
    """Write what one rank with all of these tensors would have saved at `step`.

    Into a folder that nobody reads yet: unlike a save it is not there whole or not at all.
    """
    directory = step_directory(folder, step)
    directory.mkdir(parents=True)
    path = directory / "rank_00000.safetensors"
    write_tensors(path, infos, make)
    file, checksums = file_checksums(path)
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "shards": [
                {
                    "file": path.name,
                    "offsets": [0] * len(info.shape),
                    "shape": list(info.shape),
                    "checksum": checksums[name],
                }
            ],
        }
        for name, info in infos.items()
    }
    write_manifest(directory, step, state, tensors, {path.name: file})
