"""Whether the files that a configuration names are there, before anything is started for them."""

import glob
import os

from configs.errors import ConfigError, format_value
from configs.schema import Config

# Files of text and of JSON may be compressed, each by itself.
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def _and_compressed(*extensions: str) -> tuple[str, ...]:
    packed = (f"{extension}{ending}" for ending in COMPRESSED for extension in extensions)
    return (*extensions, *packed)


# What a folder given as a source's path is searched for; a file or a glob may have any extension.
SOURCE_EXTENSIONS = {
    "text": _and_compressed(".txt"),
    "jsonl": _and_compressed(".jsonl", ".json"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}


def extensions_in_words(source: str) -> str:
    """The extensions of a kind of source, as an error names them."""
    plain = [name for name in SOURCE_EXTENSIONS[source] if not name.endswith(COMPRESSED)]
    words = " or ".join(plain)
    return words if len(plain) == len(SOURCE_EXTENSIONS[source]) else f"{words} (or compressed)"


def check_inputs(config: Config) -> None:
    """Raises ConfigError for a missing input file, or an output folder that is a file."""
    for prefix, source in config.data.mixture.items():
        for leaf, path in (("path", source.path), ("validation_path", source.validation_path)):
            if path is not None and source.source in SOURCE_EXTENSIONS:
                _check_source(f"{prefix}.{leaf}", path, f"{prefix}.source={source.source}")
    if config.data.tokenizer is not None:
        _check_tokenizer(config.data.tokenizer)
    for key, folder in (
        ("run.directory", config.run.directory),
        ("data.cache_directory", config.data.cache_directory),
    ):
        path = os.path.expanduser(folder)
        if os.path.exists(path) and not os.path.isdir(path):
            raise ConfigError(
                f"{key}={format_value(folder)} is a file; choose a folder, new or old", key
            )


def _check_tokenizer(tokenizer: str) -> None:
    what, path = f"data.tokenizer={format_value(tokenizer)}", os.path.expanduser(tokenizer)
    if not os.path.isfile(path):
        fix = "give a sentencepiece model file, or null to train one"
        raise ConfigError(f"{what} is not a file; {fix}", "data.tokenizer")
    _check_readable(what, path, "data.tokenizer")


def _check_source(key: str, path: str, setting: str) -> None:
    source = setting.rpartition("=")[2]
    extensions = SOURCE_EXTENSIONS[source]
    what, expanded = f"{key}={format_value(path)}", os.path.expanduser(path)
    wanted = extensions_in_words(source)
    if os.path.isdir(expanded):
        found = [
            os.path.join(expanded, name)
            for name in glob.glob("**", root_dir=expanded, recursive=True)
            if name.endswith(extensions)
        ]
        problem = f"is a folder without {wanted} files, which {setting} reads"
    elif os.path.exists(expanded):
        found, problem = [expanded], "is neither a file nor a folder"
    else:
        found = glob.glob(expanded, recursive=True)
        problem = "matches no file" if glob.has_magic(expanded) else "does not exist"
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        raise ConfigError(
            f"{what} {problem}; give an existing file, a glob, or a folder with {wanted} files",
            key,
        )
    for file in files:
        _check_readable(what, file, key)


def _check_readable(what: str, file: str, key: str) -> None:
    if not os.access(file, os.R_OK):
        raise ConfigError(
            f"{what}: {file} may not be read by this user; change its permissions", key
        )
