"""The on-disk format, and the detection of damage.

    step_00001000/
        rank_00000.safetensors ...   the shards of each rank; replicated tensors are stored once
        manifest.json                for each tensor: global shape, dtype, and shards (file,
                                     offsets, shape, checksum); for each file: size, and checksum
                                     of its header; the state of the run; its own checksum

The manifest is written last and the directory then renamed into place, so a directory with such a
name but no valid manifest is damaged. The layout of the ranks only decides where tensors are cut.
Nothing is pickled. Checksums (xxh3_128) detect damage; they do not stop an attacker.

Version 1 has one checksum per file and none per tensor.
"""

import errno
import json
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from configs import UserError, os_error_text

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_READABLE_VERSIONS = (1, FORMAT_VERSION)
_CHUNK_BYTES = 1 << 20


class CheckpointError(UserError):
    """A checkpoint cannot be written or read."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read."""

    directory: Path
    step: int
    state: dict[str, Any]  # what the run stores besides tensors, to determine its next step
    tensors: dict[str, dict[str, Any]]  # name -> shape, dtype, shards
    files: dict[str, dict[str, Any]]  # name -> size in bytes, checksum of the header
    held: Mapping[str, BinaryIO] = field(default_factory=dict)  # open files, see `hold`

    @cached_property
    def checksums(self) -> dict[str, dict[str, str]]:
        """For each file, the checksums of its tensors by name; the header has the name ""."""
        checksums = {name: {"": file["header"]} for name, file in self.files.items()}
        for name, entry in self.tensors.items():
            for shard in entry["shards"]:
                checksums[shard["file"]][name] = shard["checksum"]
        return checksums

    def open(self, name: str) -> BinaryIO:
        """Open a file at its start, without following links."""
        with _read_errors(name, len(self.files)):
            if name in self.held:
                file = os.fdopen(os.dup(self.held[name].fileno()), "rb")
                file.seek(0)
                return file
            return os.fdopen(os.open(self.directory / name, os.O_RDONLY | os.O_NOFOLLOW), "rb")

    def hold(self, stack: ExitStack) -> "Checkpoint":
        """Keep all files open until `stack` closes, so that they are readable after deletion."""
        return replace(
            self, held={name: stack.enter_context(self.open(name)) for name in self.files}
        )


@contextmanager
def _read_errors(name: str, num_files: int = 1) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # says nothing about the checkpoint
            enough = resource.getrlimit(resource.RLIMIT_NOFILE)[0] + num_files
            fix = f"raise the limit of open files (ulimit -n) above {enough}"
            raise UserError(f"{name} cannot be opened: {os_error_text(error)}; {fix}") from None
        is_link = error.errno == errno.ELOOP
        problem = "is a link" if is_link else f"cannot be read: {os_error_text(error)}"
        raise CheckpointError(f"{name} {problem}") from None


def step_directory(folder: Path, step: int) -> Path:
    """The directory of the checkpoint of a step."""
    return folder / f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """The step in the name of a checkpoint directory."""
    return int(directory.name.removeprefix("step_"))


def step_entries(folder: Path) -> list[Path]:
    """All entries named like a checkpoint, directories or not, oldest step first."""
    return sorted(folder.glob(f"step_{'[0-9]' * 8}"))


def checkpoint_directories(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, links to directories included."""
    return [path for path in step_entries(folder) if path.is_dir()]


def fsync(path: Path) -> None:
    """Flush the contents of a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(file: BinaryIO) -> bytes:
    """The header of a safetensors file, with the eight bytes of its length."""
    length, size = file.read(8), os.fstat(file.fileno()).st_size
    return length + file.read(min(int.from_bytes(length, "little"), size))


def tensor_ranges(header: bytes) -> dict[str, tuple[int, int]]:
    """The first byte of each tensor in a safetensors file, and the one after its last."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    shift = len(header)
    return {
        name: (shift + entry["data_offsets"][0], shift + entry["data_offsets"][1])
        for name, entry in entries.items()
    }


def _checksums(file: BinaryIO, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The checksum of the header, named "", then of each tensor whose name has the prefix."""
    header = read_header(file)
    yield "", xxhash.xxh3_128_hexdigest(header)
    for name, (begin, end) in tensor_ranges(header).items():
        if name.startswith(prefix):
            file.seek(begin)
            yield name, _digest(file, end - begin)


def _digest(file: BinaryIO, num_bytes: int) -> str:
    hasher = xxhash.xxh3_128()
    while num_bytes and (chunk := file.read(min(_CHUNK_BYTES, num_bytes))):
        hasher.update(chunk)
        num_bytes -= len(chunk)
    return hasher.hexdigest()


def describe_file(path: Path, shards: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a file for the manifest; `shards`: offsets, shapes and dtype of its tensors."""
    with path.open("rb") as file:
        checksums = dict(_checksums(file))
    return {
        "name": path.name,
        "file": {"size": path.stat().st_size, "header": checksums.pop("")},
        "shards": {name: {**shard, "checksum": checksums[name]} for name, shard in shards.items()},
    }


def write_manifest(
    directory: Path, step: int, state: dict[str, Any], descriptions: list[dict[str, Any]]
) -> None:
    """Write the manifest of files described by `describe_file`; fsync it and the directory."""
    tensors: dict[str, Any] = {}
    for description in descriptions:
        for name, shard in description["shards"].items():
            entry = {"shape": shard["global_shape"], "dtype": shard["dtype"], "shards": []}
            piece = {key: shard[key] for key in ("offsets", "shape", "checksum")}
            tensors.setdefault(name, entry)["shards"].append({"file": description["name"], **piece})
    content = {
        "format": "microtron",
        "version": FORMAT_VERSION,
        "step": step,
        "state": state,
        "files": {description["name"]: description["file"] for description in descriptions},
        "tensors": tensors,
    }
    content["checksum"] = _manifest_checksum(content)
    path = directory / MANIFEST
    path.write_text(json.dumps(content))
    fsync(path)
    fsync(directory)


def _manifest_checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(directory: Path) -> Checkpoint:
    """Read a manifest; raise CheckpointError if it is missing, damaged, or of another version."""
    with _read_errors(MANIFEST):
        data = (directory / MANIFEST).read_bytes()
    try:
        content = json.loads(data)
        if content.pop("checksum") != _manifest_checksum(content):
            raise CheckpointError(f"{MANIFEST} does not match its own checksum")
        if (version := content["version"]) not in _READABLE_VERSIONS:
            raise CheckpointError(
                f"{MANIFEST} has format version {version}; this program reads "
                f"{' and '.join(map(str, _READABLE_VERSIONS))}"
            )
        step, tensors, files = content["step"], content["tensors"], content["files"]
        if directory.name != step_directory(directory, step).name:
            raise CheckpointError(f"{MANIFEST} belongs to step {step}")
        used = {shard["file"] for entry in tensors.values() for shard in entry["shards"]}
        if not used <= files.keys() or any(Path(name).name != name for name in files):
            raise CheckpointError(f"{MANIFEST} names files outside its directory")
        return Checkpoint(directory, step, content["state"], tensors, files)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is not a manifest: {error!r}") from None


def verify_file(checkpoint: Checkpoint, name: str, prefix: str = "") -> None:
    """Raise CheckpointError if the header, or a tensor with this prefix, is damaged."""
    expected = checkpoint.files[name]
    with _read_errors(name), checkpoint.open(name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected["size"]:
            raise CheckpointError(f"{name} has {size} bytes, expected {expected['size']}")
        if "xxh3_128" in expected:  # version 1
            if _digest(file, size) != expected["xxh3_128"]:
                raise CheckpointError(f"{name} does not match its checksum")
            return
        stored = checkpoint.checksums[name]
        for part, checksum in _checksums(file, prefix):
            if checksum != stored.get(part):
                where = part or "the header"
                raise CheckpointError(f"{name} does not match its checksum in {where}")
