"""Which files a source consists of, and a fingerprint of what is in them.

Nothing is decoded here and `datasets` is not imported, because every rank of every start does this:
a corpus that is already in the cache is found by the source's bytes, and those of a file are read
once as long as its size and its time of change stay.
"""

import glob
import hashlib
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from configs.inputs import SOURCE_EXTENSIONS, extensions_in_words
from configs.schema import SourceConfig

_DIGESTS = "digests.json"
_SETTLED_NS = 2_000_000_000
# Folders of the standard library that hold other people's packages, or nothing to read.
_NOT_STDLIB = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}


def source_files(config: SourceConfig, key: str = "data") -> list[Path]:
    """Returns the source's files sorted by relative path; none for `hub`.

    `key` is what the source's keys begin with, for errors.

    The order is the order of the documents, so it must not depend on the file system.
    """
    if config.source == "hub":
        if config.path is None:
            raise ValueError(f"{key}.path is null; {key}.source=hub needs the name of a dataset")
        return []
    if config.source == "python_stdlib":
        return _stdlib_files()
    if config.path is None:
        raise ValueError(
            f"{key}.path is null; {key}.source={config.source} needs a file, a folder or a glob"
        )
    files = _matching_files(config.path, SOURCE_EXTENSIONS[config.source])
    if not files:
        raise FileNotFoundError(
            f"{key}.path={config.path!r} matches no files for {key}.source={config.source}; give a "
            f"file, a glob, or a folder with {extensions_in_words(config.source)} files"
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
    for file_hash in _digests(files, cache):
        digest.update(file_hash)
    return digest.hexdigest()


def file_digest(file: Path) -> bytes:
    """Returns the xxh3_128 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).digest()


def _digests(files: list[Path], cache: Path | None) -> list[bytes]:
    """The digests of files; `cache` remembers those of files that have not changed since."""
    index = None if cache is None else cache / _DIGESTS
    known = _read_index(index)
    digests, found_new = {}, False
    for file in files:
        status, name = file.stat(), str(file.absolute())
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        stored_stamp, digest = known.get(name, (None, ""))
        if stamp != stored_stamp:
            digest = file_digest(file).hex()
            # A file that was written just now may be written again within the clock's resolution.
            if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
                known[name], found_new = (stamp, digest), True
        digests[file] = bytes.fromhex(digest)
    if found_new and index is not None:
        index.parent.mkdir(parents=True, exist_ok=True)
        # Ranks and runs may do this at once; whichever comes last has all that it needs itself.
        with tempfile.NamedTemporaryFile("w", dir=index.parent, delete=False) as new:
            json.dump(known, new)
        os.replace(new.name, index)
    return [digests[file] for file in files]


def _read_index(path: Path | None) -> dict[str, Any]:
    try:
        index: dict[str, Any] = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError):  # it can always be made again
        return {}
    return index


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
