"""Full tensors, one at a time, for programs that convert checkpoints without building a model.

Only one tensor is in memory: a file gets its header first, then each tensor as it is produced.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.load import read_slices
from checkpoints.manifest import Checkpoint, describe_file, fsync, step_directory, write_manifest

# Names in the safetensors format.
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8  # of the header, in bytes


@dataclass(frozen=True)
class TensorInfo:
    """The dtype and shape of a tensor that does not exist yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_full_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a tensor of a verified checkpoint, assembled from all its shards."""
    stored = checkpoint.tensors[name]
    tensor = torch.empty(stored["shape"], dtype=getattr(torch, stored["dtype"]))
    read_slices(checkpoint, {name: (tensor, tuple(slice(0, size) for size in tensor.shape))})
    return tensor


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], make: Callable[[str], Tensor | None]
) -> None:
    """Write and fsync a safetensors file, calling `make` for each tensor in turn.

    If `make` returns None the tensor is all zeros and takes no disk space (a sparse file).
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
        file.truncate()  # extends the file over zeros at its end
    fsync(path)


def write_full_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    infos: Mapping[str, TensorInfo],
    make: Callable[[str], Tensor | None],
) -> None:
    """Write the checkpoint that a single rank with these tensors would save.

    Not atomic: use a folder that nobody reads yet.
    """
    directory = step_directory(folder, step)
    directory.mkdir(parents=True)
    path = directory / "rank_00000.safetensors"
    write_tensors(path, infos, make)
    shards = {
        name: {
            "global_shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "offsets": [0] * len(info.shape),
            "shape": list(info.shape),
        }
        for name, info in infos.items()
    }
    write_manifest(directory, step, state, [describe_file(path, shards)])
