"""The format: what a checkpoint directory holds, and how one is known to be whole.

    step_00001000/
        rank_00000.safetensors ...   each rank's shards, a tensor's replicas once
        manifest.json                for every tensor its global shape, dtype, and of each shard the
                                     place and the checksum; for every file its size and the
                                     checksum of its header; the state of the run; the manifest's
                                     own checksum

The manifest is written last and the directory is renamed into place after it, so a directory of
that name without a right manifest is damaged. Nothing in it depends on the layout that wrote it,
beyond where the cuts are. Nothing is pickled. Checksums (xxh3_128) find damage; they are no defence
against an attacker.

Version 1 had one checksum for each file instead, so that reading the weights alone meant reading
the moments too.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import xxhash

from configs import UserError, os_error_text

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)
_CHUNK_BYTES = 1 << 20
MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or cannot be read as what it should be."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read and whose files have been verified."""

    directory: Path
    step: int
    state: dict[str, Any]  # what decides the next step, as the run gave it
    # name -> shape, dtype, shards: file, offsets, shape, checksum
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]  # name -> size in bytes, checksum of the header
    # Of a checkpoint that is held: its files, open, so that they can be read when it is deleted.
    descriptors: dict[str, int] = field(default_factory=dict)

    @cached_property
    def checksums(self) -> dict[str, dict[str, str]]:
        """Those of each file: of its tensors by their names, and of its header by ""."""
        found = {name: {"": file["header"]} for name, file in self.files.items()}
        for name, entry in self.tensors.items():
            for shard in entry["shards"]:
                found[shard["file"]][name] = shard["checksum"]
        return found

    def path(self, name: str) -> str:
        """Where to open one of its files."""
        held = self.descriptors.get(name)
        return str(self.directory / name) if held is None else f"/dev/fd/{held}"

    def open(self, name: str) -> IO[bytes]:
        """Open one of its files at its beginning; OSError with ELOOP if it is a link."""
        held = self.descriptors.get(name)
        if held is None:
            return os.fdopen(_open_file(self.directory / name), "rb")
        os.lseek(held, 0, os.SEEK_SET)
        return os.fdopen(held, "rb", closefd=False)

    def hold(self, stack: ExitStack) -> "Checkpoint":
        """The same with all files open for as long as `stack`; CheckpointError if one cannot be."""
        descriptors: dict[str, int] = {}
        for name in self.files:
            try:
                descriptors[name] = _open_file(self.directory / name)
            except OSError as error:
                raise CheckpointError(_cannot_read(name, error)) from None
            stack.callback(os.close, descriptors[name])
        return replace(self, descriptors=descriptors)


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


def file_checksums(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the manifest says of a safetensors file, and the checksum of each tensor in it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        checksums = dict(_checksums(file, size))
    return {"size": size, "header": checksums.pop("")}, checksums


def _checksums(file: IO[bytes], size: int, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The checksum of the header, by the name "", and of each tensor whose name has the prefix."""
    length = file.read(8)
    header = file.read(min(int.from_bytes(length, "little"), size))
    yield "", xxhash.xxh3_128_hexdigest(length + header)
    start, entries = file.tell(), json.loads(header)
    for name, entry in entries.items():
        if name.startswith(prefix) and name != "__metadata__":
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            yield name, _digest(file, end - begin)


def _digest(file: IO[bytes], num_bytes: int) -> str:
    hasher, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_CHUNK_BYTES, num_bytes)))
    while num_bytes and (count := file.readinto(buffer[:num_bytes])):  # type: ignore[attr-defined]
        hasher.update(buffer[:count])
        num_bytes -= count
    return hasher.hexdigest()


def _open_file(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _cannot_read(name: str, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return f"{name} is not a plain file of the checkpoint"
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    return f"{name} cannot be read: {os_error_text(error)}"


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
        if content["version"] not in _READABLE_VERSIONS:
            raise CheckpointError(
                f"{MANIFEST} has format version {content['version']}, this program reads "
                f"{' and '.join(map(str, _READABLE_VERSIONS))}"
            )
        if directory.name != step_directory(directory, content["step"]).name:
            raise CheckpointError(f"{MANIFEST} is that of step {content['step']}")
    except OSError as error:
        raise CheckpointError(_cannot_read(MANIFEST, error)) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest: {error!r}") from None
    return Checkpoint(
        directory, content["step"], content["state"], content["tensors"], content["files"]
    )


def verify_file(checkpoint: Checkpoint, name: str, prefix: str = "") -> str | None:
    """What is wrong with one file of a checkpoint; None if it is as it was written.

    Of its tensors only those whose names begin with `prefix` are read.
    """
    if Path(name).name != name:
        return f"{name} is not a plain file of the checkpoint"
    expected = checkpoint.files[name]
    try:
        with checkpoint.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if "xxh3_128" in expected:  # version 1
                is_whole = _digest(file, size) == expected["xxh3_128"]
                return None if is_whole else f"{name} does not match its checksum"
            stored = checkpoint.checksums[name]
            for part, checksum in _checksums(file, size, prefix):
                if checksum != stored.get(part):
                    return f"{name} does not match its checksum in {part or 'the header'}"
    except OSError as error:
        return _cannot_read(name, error)
    return None
