"""The files of a source, and a fingerprint of their content.

Every rank does this at every start, so nothing is decoded here and `datasets` is not imported. A
file is read once for its digest, and again only when its size, times or inode have changed.
"""

import glob
import json
import os
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from configs.errors import UserError
from configs.schema import SourceConfig
from configs.validate import COMPRESSED, SOURCE_EXTENSIONS, extensions_in_words, index_of
from data.cache import digests

TEMPLATE_VERSION = 1  # of data/corpus/segments.py; raise it when segments change
# Folders of the standard library that hold installed packages, or nothing to read.
_NOT_STDLIB = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class SourceKeys(NamedTuple):
    """How errors name a source: the beginning of its keys, and the key of its path."""

    prefix: str
    path: str


DATA_KEYS = SourceKeys("data.", "data.path")  # of the only source, if there is just one


def source_files(config: SourceConfig, keys: SourceKeys = DATA_KEYS) -> list[Path]:
    """Return the source's files sorted by relative path; none for `hub`, the .bin of `megatron`.

    The order is the order of the documents, so it must not depend on the file system.
    """
    if config.source == "python_stdlib":
        return _stdlib_files()
    if config.path is None:
        needed = "the name of a dataset" if config.source == "hub" else "a file, a folder or a glob"
        raise UserError(f"{keys.path} is null; {keys.prefix}source={config.source} needs {needed}")
    if config.source == "hub":
        return []
    files = _matching_files(config.path, SOURCE_EXTENSIONS[config.source])
    if config.source == "megatron":  # a prefix, or a pattern that matches both of its files
        found = {Path(index_of(str(file))) for file in [*files, Path(config.path).expanduser()]}
        files = sorted(index for index in found if index.suffix == ".idx" and index.is_file())
    if not files:
        raise UserError(
            f"{keys.path}={config.path!r} matches no files for {keys.prefix}source="
            f"{config.source}; give a file, a glob, or a folder with "
            f"{extensions_in_words(config.source)} files"
        )
    if config.source == "megatron":
        files = [index.with_suffix(".bin") for index in files]
        if missing := [file for file in files if not file.is_file()]:
            beside = f"beside {missing[0].stem}.idx; both are needed"
            raise UserError(f"{keys.path}: {missing[0]} does not exist {beside}")
    return files


def source_fingerprint(config: SourceConfig, files: list[Path], cache: Path) -> str:
    """Return the xxh3_128 of everything that decides which documents a source has, as hex.

    Local files count by content and order, not by name, so a moved folder keeps its fingerprint;
    names in a folder that `hub` reads count, for they may name splits. Another hub dataset counts
    by name and revision: its content is unknown before it is downloaded.
    """
    digest = xxhash.xxh3_128()
    # Only tables have columns; python_stdlib and text are read in the same way.
    kind: list[Any] = ["text"]
    if config.source in ("jsonl", "parquet", "arrow"):
        kind = [config.source, *config.columns.values()]
    if config.source == "hub":
        kind = ["hub", config.path, config.hub_config, config.hub_split, config.hub_revision]
        kind += config.columns.values()
        if config.path is not None and os.path.isdir(config.path):
            files = _matching_files(config.path, ("",))
            kind[1] = [file.relative_to(config.path).as_posix() for file in files]
    if config.source == "megatron":
        kind = ["megatron"]
        files = [*files, *(file.with_suffix(".idx") for file in files)]
    if config.format != "text":
        kind += [config.format, str(TEMPLATE_VERSION)]
    digest.update(json.dumps(kind).encode())
    for file, file_hash in zip(files, digests(files, cache), strict=True):
        digest.update(file_hash)
        if file.suffix in COMPRESSED:  # the suffix decides how the file is read
            digest.update(file.suffix.encode())
    return digest.hexdigest()


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    # Distributions may leave dangling links, such as Debian's sitecustomize.py.
    return sorted(filter(Path.is_file, found), key=lambda file: file.relative_to(root).as_posix())


def _matching_files(path: str, extensions: tuple[str, ...]) -> list[Path]:
    """Return the files of a folder (searched recursively), a single file, or a glob."""
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        names = glob.glob("**", root_dir=expanded, recursive=True)
        found = [Path(expanded, name) for name in sorted(names) if name.endswith(extensions)]
    elif os.path.isfile(expanded):
        found = [Path(expanded)]
    else:
        found = [Path(name) for name in sorted(glob.glob(expanded, recursive=True))]
    return [file for file in found if file.is_file()]
