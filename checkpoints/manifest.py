"""The format: what a checkpoint directory holds, and how one is known to be whole.

    step_00001000/
        rank_00000.safetensors ...   each rank's shards, a tensor's replicas once
        manifest.json                for every tensor its global shape, dtype and where each
                                     shard lies; for every file its size and hash; the state of
                                     the run; the manifest's own checksum

The manifest is written last and the directory is renamed into place after it, so a directory of
that name without a right manifest is damaged. Nothing in it depends on the layout that wrote it,
beyond where the cuts are. Nothing is pickled. The hash finds damage; it is no defence against an
attacker.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from configs import UserError, os_error_text

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be read as what it should be."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read and whose files have been verified."""

    directory: Path
    step: int
    state: dict[str, Any]  # what decides the next step, as the run gave it
    tensors: dict[str, dict[str, Any]]  # name -> shape, dtype, shards: file, offsets, shape
    files: dict[str, dict[str, Any]]  # name -> size in bytes, xxh3_128


def step_directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}"


def checkpoint_directories(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, links to directories included.

    Everything else in the folder is someone else's.
    """
    return [path for path in _named_as_checkpoints(folder) if path.is_dir()]


def foreign_entries(folder: Path) -> list[Path]:
    """Files and dangling links with the name of a checkpoint."""
    return [path for path in _named_as_checkpoints(folder) if not path.is_dir()]


def _named_as_checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step_{'[0-9]' * 8}"))


def hash_file(path: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def write_manifest(
    directory: Path,
    step: int,
    state: dict[str, Any],
    tensors: dict[str, Any],
    files: dict[str, Any],
) -> None:
    """Write the manifest of a directory whose other files are complete, and fsync both."""
    content = {
        "format": "microtron",
        "version": FORMAT_VERSION,
        "step": step,
        "state": state,
        "files": files,
        "tensors": tensors,
    }
    content["checksum"] = _checksum(content)
    path = directory / MANIFEST
    path.write_text(json.dumps(content))
    fsync(path)
    fsync(directory)


def read_manifest(directory: Path) -> Checkpoint:
    """Read and check a manifest, without looking at the other files.

    Raises CheckpointError if it is missing, torn, altered, of another version or of another step.
    """
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise CheckpointError(f"{MANIFEST} does not match its own checksum")
        if content["version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{MANIFEST} has format version {content['version']}, this program reads "
                f"{FORMAT_VERSION}"
            )
        if directory.name != step_directory(directory, content["step"]).name:
            raise CheckpointError(f"{MANIFEST} is that of step {content['step']}")
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {os_error_text(error)}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest: {error!r}") from None
    return Checkpoint(
        directory, content["step"], content["state"], content["tensors"], content["files"]
    )


def verify_file(checkpoint: Checkpoint, name: str) -> str | None:
    """What is wrong with one file of a checkpoint; None if it is as it was written."""
    path, expected = checkpoint.directory / name, checkpoint.files[name]
    try:
        size = path.lstat().st_size
        if path.is_symlink() or Path(name).name != name:
            return f"{name} is not a plain file of the checkpoint"
        if size != expected["size"]:
            return f"{name} has {size} bytes, not {expected['size']}"
        if hash_file(path) != expected["xxh3_128"]:
            return f"{name} does not match its hash"
    except OSError as error:
        return f"{name} cannot be read: {os_error_text(error)}"
    return None
