"""Which files a source consists of, and a fingerprint of what is in them.

Nothing is decoded here and `datasets` is not imported, because every rank of every start does this:
a corpus that is already in the cache is found by the source's bytes, and those of a file are read
once as long as its size, its times of change and its inode stay.
"""

import contextlib
import glob
import hashlib
import json
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from configs.errors import UserError
from configs.schema import SourceConfig
from configs.validate import COMPRESSED, SOURCE_EXTENSIONS, extensions_in_words
from data.corpus.durable import locked, replace_durably
from data.corpus.progress import Progress

_SETTLED_NS = 2_000_000_000
_SAVE_INTERVAL_S = 30.0
# Folders of the standard library that hold other people's packages, or nothing to read.
_NOT_STDLIB = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class SourceKeys(NamedTuple):
    """What errors call a source: what its keys begin with, and the key of its path."""

    section: str
    path: str


DATA_KEYS = SourceKeys("data", "data.path")  # of the only source, if there is one


def source_files(config: SourceConfig, keys: SourceKeys = DATA_KEYS) -> list[Path]:
    """Returns the source's files sorted by relative path; none for `hub`.

    The order is the order of the documents, so it must not depend on the file system.
    """
    if config.source == "hub":
        if config.path is None:
            raise UserError(
                f"{keys.path} is null; {keys.section}.source=hub needs the name of a dataset"
            )
        return []
    if config.source == "python_stdlib":
        return _stdlib_files()
    if config.path is None:
        raise UserError(
            f"{keys.path} is null; {keys.section}.source={config.source} needs a file, a folder or "
            "a glob"
        )
    files = _matching_files(config.path, SOURCE_EXTENSIONS[config.source])
    if not files:
        raise UserError(
            f"{keys.path}={config.path!r} matches no files for {keys.section}.source="
            f"{config.source}; give a file, a glob, or a folder with "
            f"{extensions_in_words(config.source)} files"
        )
    return files


def source_fingerprint(config: SourceConfig, files: list[Path], cache: Path | None = None) -> str:
    """Returns the xxh3_128 of all that decides which documents the source yields, as hex.

    Local files count by content and order, not by name, so that a moved folder is still known. A
    hub dataset counts by its name and revision: its content cannot be seen without downloading it.
    `cache`: a folder that remembers the hashes of files that have not changed since.
    """
    digest = xxhash.xxh3_128()
    # The column only matters where there are columns; python_stdlib and text read the same way.
    kind: list[str | None] = ["text"]
    if config.source in ("jsonl", "parquet", "arrow"):
        kind = [config.source, config.text_field]
    if config.source == "hub":
        kind = ["hub", config.path, config.hub_config, config.hub_split, config.hub_revision]
        kind.append(config.text_field)
    digest.update(json.dumps(kind).encode())
    for file, file_hash in zip(files, digests(files, cache), strict=True):
        digest.update(file_hash)
        if file.suffix in COMPRESSED:  # which decides how it is read
            digest.update(file.suffix.encode())
    return digest.hexdigest()


def file_digest(file: Path) -> bytes:
    """Returns the xxh3_128 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).digest()


def digests(files: list[Path], cache: Path | None) -> list[bytes]:
    """The digests of files; `cache` remembers those of files that have not changed since."""
    if cache is None:
        return [file_digest(file) for file in files]
    index = _Index(cache)
    if not all(index.knows(file) for file in files):
        if cache.exists() and not os.access(cache, os.W_OK):  # nothing can be remembered
            return [file_digest(file) for file in files]
        # One rank of a host, or run, after the other: what one has read the next need not.
        with locked([index.path]), Progress("hashing files", _total_bytes(files)) as progress:
            index = _Index(cache)
            done_bytes = 0
            for file in files:
                progress.reach(done_bytes)
                index.look_at(file)
                done_bytes += file.stat().st_size
            index.save()
    return [index.digest(file) for file in files]


def _total_bytes(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


class _Index:
    """The digests of files by name, size, times of change and inode, kept in a file."""

    def __init__(self, cache: Path) -> None:
        self.path = cache / "digests.json"
        self._saved_at = time.monotonic()
        self._fresh: dict[str, str] = {}
        self._known: dict[str, Any] = {}
        # Whatever is wrong with it, it can be made again.
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(self.path.read_text())

    def knows(self, file: Path) -> bool:
        """True if a file is as it was when it was hashed."""
        return self._known.get(str(file.absolute()), [None])[0] == _stamp(file)

    def look_at(self, file: Path) -> None:
        """Hashes a file if need be."""
        if self.knows(file):
            return
        stamp, digest = _stamp(file), file_digest(file).hex()
        # A file that was written just now may be written again within the clock's resolution.
        if time.time_ns() - file.stat().st_mtime_ns > _SETTLED_NS:
            self._known[str(file.absolute())] = [stamp, digest]
        self._fresh[str(file.absolute())] = digest
        if time.monotonic() - self._saved_at > _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Writes the index."""
        replace_durably(self.path, json.dumps(self._known).encode())
        self._saved_at = time.monotonic()

    def digest(self, file: Path) -> bytes:
        """The digest of a file that was looked at, or is known."""
        name = str(file.absolute())
        return bytes.fromhex(self._fresh.get(name) or self._known[name][1])


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    # The time of modification can be set to anything; that of the last change of state cannot.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(_python_files(root), key=lambda file: file.relative_to(root).as_posix())


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        for name in names:
            file = Path(folder, name)
            # Distributions may leave dangling links, such as Debian's sitecustomize.py.
            if file.suffix == ".py" and file.is_file():
                yield file


def _matching_files(path: str, extensions: tuple[str, ...]) -> list[Path]:
    """Returns the files of a folder (searched recursively), a single file, or a glob."""
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        names = glob.glob("**", root_dir=expanded, recursive=True)
        found = [Path(expanded, name) for name in sorted(names) if name.endswith(extensions)]
    elif os.path.isfile(expanded):
        found = [Path(expanded)]
    else:
        found = [Path(name) for name in sorted(glob.glob(expanded, recursive=True))]
    return [file for file in found if file.is_file()]
