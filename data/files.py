"""Which files a source consists of, and a fingerprint of what is in them.

Nothing is decoded here and `datasets` is not imported, because every rank of every start does this:
a corpus that is already in the cache is found by reading the source's bytes once.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import xxhash

from configs.inputs import SOURCE_EXTENSIONS
from configs.schema import DataConfig

# Folders of the standard library that hold other people's packages, or nothing to read.
_NOT_STDLIB = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}


def source_files(config: DataConfig) -> list[Path]:
    """Returns the source's files sorted by relative path; none for `hub`.

    The order is the order of the documents, so it must not depend on the file system.
    """
    if config.source == "hub":
        if config.path is None:
            raise ValueError("data.path is null; data.source=hub needs the name of a dataset")
        return []
    if config.source == "python_stdlib":
        return _stdlib_files()
    if config.path is None:
        raise ValueError(
            f"data.path is null; data.source={config.source} needs a file, a folder or a glob"
        )
    files = _matching_files(config.path, SOURCE_EXTENSIONS[config.source])
    if not files:
        raise FileNotFoundError(
            f"data.path={config.path!r} matches no files for data.source={config.source}; give a "
            f"file, a glob, or a folder with {' or '.join(SOURCE_EXTENSIONS[config.source])} files"
        )
    return files


def source_fingerprint(config: DataConfig, files: list[Path]) -> str:
    """Returns the xxh3_128 of all that decides which documents the source yields, as hex.

    Local files count by content and order, not by name, so that a moved folder is still known. A
    hub dataset counts by its name and revision: its content cannot be seen without downloading it.
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
    for file in files:
        digest.update(file_digest(file))
    return digest.hexdigest()


def file_digest(file: Path) -> bytes:
    """Returns the xxh3_128 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).digest()


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
