"""From arguments and a YAML file to a checked `Config`."""

import dataclasses
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf

from configs.errors import ConfigError, bad_setting, format_value, nearest, os_error_text
from configs.fields import KEYS, SECTIONS, Field, convert, unknown_key
from configs.init_from import config_of_source, inherit
from configs.launch import is_rank_zero, world_size_from_environment
from configs.schema import REMOVED, REMOVED_VALUES, RENAMED, Config, DataConfig
from configs.tokenizer_files import expand_path, resolve_tokenizer
from configs.validate import check_inputs, validate

logger = logging.getLogger("microtron")

SHIPPED: list[Path] = sorted(Path(__file__).parent.glob("*.yaml"))
_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_CONFIG = Field("config", str, default=None, markers=("literal",))
# Settings of a single launch, which a run folder's config.yaml does not hand on.
_OF_ONE_LAUNCH = ("run.resume", "run.stop_at_step")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Keeps scalars as text, except for null, and refuses aliases, which can multiply."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own declaration
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012 - other tags, such as !!int, are errors
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "seq", "map")))
    }

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"aliases such as *{event.anchor} are not supported; repeat the value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def parse_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """Return the configuration, checked against ranks and input files, or against `num_ranks`."""
    overrides = parse_arguments(arguments, {"config": _CONFIG, **KEYS})
    name = overrides.pop("config", "")
    if not name and overrides.get("run.init_from") is not None:
        name = config_of_source(overrides)
    path = _find(name)
    values, places = _read(path)
    if path.name == "config.yaml" and (path.parent / "checkpoints").is_dir():
        _use_run_folder(path, values, overrides)
    try:
        config = inherit(_build(values | overrides, path), values | overrides)
        if num_ranks is None or config.data.vocab_size is None:
            config = resolve_tokenizer(config)
        validate(config, num_ranks(config) if num_ranks else world_size_from_environment())
        if num_ranks is None:
            check_inputs(config)
    except ConfigError as error:
        raise _located(error, places, overrides) from error
    return config


def read_config(path: Path) -> Config:
    """Read a configuration, such as a run folder's, without checking ranks and input files."""
    values, places = _read(path)
    try:
        config = _build(values, path)
        validate(config, config.parallel.smallest_world_size)
    except ConfigError as error:
        raise _located(error, places, {}) from error
    return config


def to_yaml(config: Config) -> str:
    """Return the text of a YAML file that reads back as the same configuration."""
    text: str = yaml.safe_dump(
        dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=sys.maxsize
    )
    return f"# All settings of run {config.run.name}, command-line overrides included.\n{text}"


def parse_arguments(arguments: list[str], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Return the values of `key=value` arguments by key; the last one of a key counts."""
    texts: dict[str, str] = {}
    for argument in arguments:
        # Arguments are UTF-8 in any locale; bytes that are not become surrogates again.
        text = os.fsencode(argument).decode("utf-8", "surrogateescape")
        written, equals, text = text.partition("=")
        key = written.strip().lstrip("-")
        if not equals:
            raise ConfigError(
                f"{format_value(argument)} has no '='; write {_with_equals(key, fields)}"
            )
        name = current_name(key)
        if name in REMOVED:
            continue
        if name not in fields and key in KEYS:  # a program's setting, written as for train.py
            name = key.rpartition(".")[2]
        if name not in fields and key in KEYS:
            raise bad_setting(key, text, "is a setting of the run; its config.yaml sets it")
        if name not in fields:
            raise unknown_key(key, text, fields)
        if key != written.strip():
            raise ConfigError(f"{argument} has dashes; write {key}={format_value(text)}", key)
        texts[name] = text
    return {n: _convert(fields[n], _parse_value(fields[n], text)) for n, text in texts.items()}


def _convert(field: Field, value: object) -> Any:
    """Convert a value; of one that no longer exists, warn and return the default."""
    if field.name in REMOVED_VALUES and value == REMOVED_VALUES[field.name]:
        if is_rank_zero():
            text = "%s=%s no longer exists; using %s"
            logger.warning(text, field.name, value, field.default)
        return field.default
    return convert(field, value)


def _with_equals(key: str, fields: Mapping[str, Field]) -> str:
    """Return what an argument without `=` was probably meant to be."""
    if "config" in fields and (key.endswith(".yaml") or key in {path.stem for path in SHIPPED}):
        return f"config={key}"
    if "run" in fields and os.path.isdir(key):
        return f"run={key}"
    return f"{key if key in fields else 'key'}=value, without spaces or dashes (all keys: --help)"


def _parse_value(field: Field, text: str) -> object:
    """Return the text of an argument, null, or the parsed YAML of a list or a quoted string."""
    is_string = field.hint is str
    is_quoted = is_string and len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if "literal" in field.markers:
        return text
    if is_quoted or get_origin(field.hint) is tuple:
        try:
            return _parse_yaml(text, root=field.name)[0]
        except (yaml.YAMLError, RecursionError):
            raise bad_setting(field.name, text, "is not valid YAML") from None
    return None if text.lower() in ("~", "null") or not (text or is_string) else text


@functools.cache
def current_name(key: str) -> str:
    """Return the current name of a key; warn once about an old name."""
    if key in RENAMED and is_rank_zero():
        logger.warning("%s is now called %s; the old name still works", key, RENAMED[key])
    if key in REMOVED and is_rank_zero():
        logger.warning("%s no longer exists and is ignored; remove it", key)
    return RENAMED.get(key, key)


def _find(name: str) -> Path:
    """Return the file that config=NAME means: as given, else a shipped one; .yaml is optional."""
    shipped = f"shipped: {', '.join(path.name for path in SHIPPED)} (config=list describes them)"
    if not name:
        raise ConfigError(f"config=NAME.yaml is required; {shipped}")
    folder, given = Path(__file__).parent, Path(os.path.expanduser(os.fsdecode(name.encode())))
    for path in (given, Path(f"{given}.yaml"), folder / given, folder / f"{given}.yaml"):
        if os.path.isfile(path):  # False for a name that is too long, where Path raises
            return path
    near = nearest(given.stem, [path.stem for path in SHIPPED])
    hint = f"did you mean config={near}.yaml? " if near else ""
    raise bad_setting("config", name, f"is not a file here or in configs/; {hint}{shipped}")


def _parse_yaml(text: str, file: str = "", root: str = "") -> tuple[Any, dict[str, str]]:
    """Return the contents of a YAML text, and `file:line: ` of each key in it."""
    stream = io.StringIO(text)
    stream.name = file  # for error messages
    loader = _Loader(stream)
    places: dict[str, str] = {}
    try:
        node = loader.get_single_node()
        contents = loader.construct_document(node) if node else None
    finally:
        loader.dispose()
    for key, line in _lines(node, root):
        place = f"{file}:{line}: " if file else ""
        if key in places:
            raise ConfigError(f"{place}{key} is already set; remove one of the two", key)
        places[key] = place
    return contents, places


def _lines(node: yaml.Node | None, key: str) -> Iterator[tuple[str, int]]:
    """Yield the full name and the line of each key and list item below a YAML node."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        prefix = f"{key}." if key else ""
        children = [(f"{prefix}{name.value}", name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(f"{key}[{i}]", item, item) for i, item in enumerate(node.value)]
    for name, place, value in children:
        yield name, place.start_mark.line + 1
        yield from _lines(value, name)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a YAML file by key, and the place of each key."""
    relative = os.path.relpath(path)
    file = str(path) if relative.startswith("..") else relative
    try:
        contents, places = _parse_yaml(path.read_text("utf-8-sig"), file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {os_error_text(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: is nested too deeply; sections hold plain values") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        raise ConfigError(f"{file}{line}: is not valid YAML: {problem}{hint}") from error
    if not isinstance(contents, dict | None):
        example = "write for example 'train:' and below it, indented, 'train_steps: 100'"
        raise ConfigError(f"{file}:1: this is not a mapping of sections; {example}")
    places = {RENAMED.get(key, key): place for key, place in places.items()}
    try:
        return _values(contents or {}), places
    except ConfigError as error:
        raise _located(error, places, {}) from error


def _values(contents: dict[Any, Any]) -> dict[str, Any]:
    """Convert the contents of a file to values by key."""
    values = {}
    for section, settings in contents.items():
        items = {section: settings}
        if section in SECTIONS and isinstance(settings, dict | None):
            items = {f"{section}.{leaf}": value for leaf, value in (settings or {}).items()}
        for key, value in items.items():
            name = current_name(key)
            if name in KEYS:
                values[name] = _convert(KEYS[name], value)
            elif name not in REMOVED:
                raise unknown_key(str(key), value, KEYS)
    return values


def _use_run_folder(path: Path, values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Prepare the values of a run folder's config.yaml for another launch, and log that."""
    folder, name = path.parent.resolve(), values.get("run.name")
    own = Path(os.path.expanduser(values.get("run.directory", "runs")), name or "").resolve()
    if own != folder and "run.name" not in overrides:
        raise ConfigError(
            f"config={format_value(str(path))} belongs to {own}; give run.name, and run.directory "
            f"(run.name={folder.name} run.directory={folder.parent} to use this folder)",
            "run.name",
        )
    for key in _OF_ONE_LAUNCH:
        values.pop(key, None)
    if "run.init_from" in overrides:
        values.pop("run.init_optimizer", None)
    if overrides.get("run.init_from", values.get("run.init_from")) is not None:
        values.pop("data.tokenizer", None)  # that of a source that may be gone
    tokenizer = os.path.expanduser(values.get("data.tokenizer") or path.parent)
    if not os.path.exists(tokenizer):
        values["data.tokenizer"] = str(path.parent)  # which has a copy
    if is_rank_zero():
        kept = f"using the settings of run {name} from {path}, with the overrides of its last"
        logger.warning("%s launch, except %s", kept, " and ".join(_OF_ONE_LAUNCH))


def _build(values: Mapping[str, Any], path: Path) -> Config:
    """Put values over the defaults; the run's name is that of the file unless it is given."""
    sections: dict[str, dict[str, Any]] = {"run": {}}
    for key, value in values.items():
        section, leaf = key.split(".")
        sections.setdefault(section, {})[leaf] = value
    origin = "" if sections["run"].get("name") else f" (from the file {path.name})"
    name = sections["run"]["name"] = sections["run"].get("name") or path.stem
    if not _RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"run.name={format_value(name)}{origin} cannot be the name of a folder; use 1 to 64 of "
            "the characters A-Z a-z 0-9 . _ - and begin with a letter, a digit or _",
            "run.name",
        )
    config = cast(Config, OmegaConf.to_object(OmegaConf.merge(_defaults(), sections)))
    directory = expand_path("run.directory", config.run.directory)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, directory=directory))


@functools.cache
def _defaults() -> DictConfig:
    # A DataConfig replaces null by what suits its format, so its defaults are those of the class.
    defaults = OmegaConf.merge(OmegaConf.structured(Config), {"data": DataConfig})
    return cast(DictConfig, defaults)


def _located(
    error: ConfigError, places: Mapping[str, str], overrides: Mapping[str, Any]
) -> ConfigError:
    """Return the error with the file and line to change, unless it names an override."""
    wrong = str(error).partition(";")[0]
    named = [key for key in (*overrides, *places) if f"{key}=" in wrong or f"{key}[" in wrong]
    if any(key in overrides for key in named):
        return error
    # The key to change may have its default; then another key in the error shows where to look.
    place = next((places[key] for key in (error.key or "", *named) if key in places), "")
    return ConfigError(f"{place}{error}", error.key)
