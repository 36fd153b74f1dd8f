"""From a command line to a checked `Config`: defaults < config=NAME.yaml < section.key=value."""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import cast

import yaml
from omegaconf import OmegaConf

from configs.errors import ConfigError, format_value, os_error_text
from configs.fields import KEYS, SECTIONS
from configs.inputs import check_inputs
from configs.launch import (
    exit_with_error,
    is_rank_zero,
    limit_thread_spinning,
    world_size_from_environment,
)
from configs.schema import Config
from configs.suggest import suggest
from configs.usage import SHIPPED, config_list, usage
from configs.validate import validate
from configs.values import argument_node, compose, convert, display, error, mapping_items

HELP = {"--help", "-h", "help"}
_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
Settings = dict[str, yaml.Node]  # by section.key


def load_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """The configuration of a training launch; ends the process if there is none.

    `--help` and `config=list` print and exit with 0; an error prints one line and exits with 2.
    `num_ranks`: see parse_config.
    """
    limit_thread_spinning()
    text = usage() if HELP & set(arguments) else None
    if text or "config=list" in arguments:
        if is_rank_zero():
            sys.stdout.write(text or config_list())
        raise SystemExit(0)
    try:
        return parse_config(arguments, num_ranks)
    except ConfigError as problem:
        exit_with_error(f"config error: {problem}")


def parse_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """The configuration, checked against the number of ranks and the input files, or ConfigError.

    With `num_ranks`, it is checked against that many ranks and no files, as a plan needs it.
    """
    name, overrides = _command_line(arguments)
    path = _find(name)
    from_file = _read(path)
    config = _merge(from_file, overrides)
    try:
        config = _with_run_name(config, path)
        validate(config, num_ranks(config) if num_ranks else world_size_from_environment())
        if num_ranks is None:
            check_inputs(config)
    except ConfigError as problem:
        raise _located(problem, from_file, overrides) from problem
    return config


def read_config(path: Path) -> Config:
    """The configuration in a file, such as a run folder's, for any number of ranks.

    Types and ranges are checked; ranks and input files are not, as an evaluation needs neither.
    """
    config = _with_run_name(_merge(_read(path), {}), path)
    validate(config, config.parallel.tensor_model_parallel_size)
    return config


def to_yaml(config: Config) -> str:
    """The text of a YAML file that reads back as the same configuration."""
    text: str = yaml.safe_dump(
        dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=sys.maxsize
    )
    return f"# All settings of run {config.run.name}.\n{text}"


def split_argument(argument: str, known: Container[str]) -> tuple[str, str, str]:
    """The key of `key=value` without dashes, the value, and the key as it was written."""
    written, equals, value = argument.partition("=")
    key = written.strip().lstrip("-")
    if not equals:
        if argument.endswith(".yaml") or argument in {path.stem for path in SHIPPED}:
            fix = f"config={argument}"
        elif "run" in known and os.path.isdir(argument):
            fix = f"run={argument}"
        else:
            fix = f"{key if key in known else 'key'}=value, without spaces or dashes"
        raise ConfigError(f"{format_value(argument)} has no '='; write {fix} (all keys: --help)")
    return key, value, written.strip()


def _command_line(arguments: list[str]) -> tuple[str, Settings]:
    """The config's name and the settings after it; of a key given twice the last counts."""
    name, settings = "", Settings()
    for argument in arguments:
        key, value, written = split_argument(argument, {*KEYS, "config"})
        if key in SECTIONS or (key != "config" and key not in KEYS):
            raise ConfigError(_explain_unknown(key, format_value(value)))
        if key != written:
            raise ConfigError(f"{argument} has dashes; write {key}={format_value(value)}")
        if key == "config":
            if name:
                both = f"{format_value(name)} and {format_value(value)}"
                raise ConfigError(f"config is given twice, as {both}; give one")
            name = value
        else:
            settings[key] = argument_node(KEYS[key], value)
    if not name:
        raise ConfigError(f"config=NAME.yaml is required; {_shipped_names()}")
    return name, settings


def _explain_unknown(name: str, value: str) -> str:
    section = name.partition(".")[0]
    keys = [key for key in KEYS if key.startswith(f"{section}.")]
    if name in SECTIONS:
        return (
            f"{name}={value} gives a value to a section; set its keys one by one, such as "
            f"{keys[0]}, or choose a file with config=NAME.yaml"
        )
    if meant := suggest(name, KEYS):
        fix = f"did you mean {meant}?"
    elif keys:
        leaves = ", ".join(key.partition(".")[2] for key in keys)
        fix = f"the keys of {section} are: {leaves}"
    else:
        fix = f"the sections are: {', '.join(SECTIONS)} (all keys: python train.py --help)"
    return f"{name}={value}: there is no key {name}; {fix}"


def _find(name: str) -> Path:
    """The file that config=NAME means: as given, then a shipped one; .yaml may be left out."""
    folder = Path(__file__).parent
    given = Path(os.path.expanduser(name))
    for path in (given, Path(f"{given}.yaml"), folder / given, folder / f"{given}.yaml"):
        if os.path.isfile(path):  # False for a name that is too long, where Path raises
            return path
    nearest = difflib.get_close_matches(given.stem, [path.stem for path in SHIPPED], n=1)
    hint = f"did you mean config={nearest[0]}.yaml? " if nearest else ""
    raise ConfigError(
        f"config={format_value(name)} is not a file here or in configs/; {hint}{_shipped_names()}"
    )


def _shipped_names() -> str:
    return f"shipped: {', '.join(path.name for path in SHIPPED)} (config=list describes them)"


def _read(path: Path) -> Settings:
    """The settings of a YAML file, as nodes; an empty file or section has none."""
    root = _compose_file(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        example = "write for example 'train:' and below it, indented, 'train_steps: 100'"
        raise error(root, f"this is not a mapping of sections; {example}", "")
    return dict(setting for item in mapping_items(root, "") for setting in _section(*item))


def _section(name: str, node: yaml.Node, content: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    if name in KEYS:
        section, leaf = name.split(".")
        fix = f"write '{section}:' and below it, indented, '{leaf}: VALUE'"
        raise error(node, f"{name} is written with a dot; in a file {fix}", name)
    is_empty = isinstance(content, yaml.ScalarNode) and content.value in ("", "~", "null")
    if name in SECTIONS and is_empty:
        return
    if name not in SECTIONS or not isinstance(content, yaml.MappingNode):
        raise error(node, _explain_unknown(name, display(content)), name)
    for key, key_node, value in mapping_items(content, f"{name}."):
        if key not in KEYS:
            raise error(key_node, _explain_unknown(key, display(value)), key)
        yield key, value


def _compose_file(path: Path) -> yaml.Node | None:
    file = display_path(path)
    try:
        return compose(path.read_text("utf-8-sig"), file)
    except OSError as problem:
        raise ConfigError(f"{file}: cannot be read: {os_error_text(problem)}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {problem.start})") from problem
    except RecursionError as problem:
        raise ConfigError(f"{file}: is nested too deeply; sections hold plain values") from problem
    except yaml.MarkedYAMLError as problem:
        line = f":{problem.problem_mark.line + 1}" if problem.problem_mark else ""
        hint = "; indent with spaces, not tabs" if "\\t" in str(problem.problem) else ""
        raise ConfigError(f"{file}{line}: is not valid YAML: {problem.problem}{hint}") from problem
    except yaml.YAMLError as problem:
        raise ConfigError(
            f"{file}: is not valid YAML: {' '.join(str(problem).split())}"
        ) from problem


def display_path(path: Path) -> str:
    """A path as a person would type it: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _merge(*layers: Settings) -> Config:
    """Each layer over the one before, over the defaults."""
    merged = OmegaConf.structured(Config)
    for layer in layers:
        values: dict[str, dict[str, object]] = {}
        for key, node in layer.items():
            section, leaf = key.split(".")
            values.setdefault(section, {})[leaf] = convert(KEYS[key], node)
        merged = OmegaConf.merge(merged, values)
    return cast(Config, OmegaConf.to_object(merged))


def _located(problem: ConfigError, from_file: Settings, overrides: Settings) -> ConfigError:
    """The error with the file and line to change, unless it names a key of the command line."""

    def is_named(key: str) -> bool:
        wrong = str(problem).partition(";")[0]
        return f"{key}=" in wrong or f"{key}[" in wrong

    if any(map(is_named, overrides)):
        return problem
    # The key to change may have its default; then another one in the error shows where to look.
    keys = [key for key in from_file if key == problem.key] or filter(is_named, from_file)
    node = next((from_file[key] for key in keys), None)
    return error(node, str(problem), problem.key or "") if node else problem


def _with_run_name(config: Config, path: Path) -> Config:
    """Fill in the run's name, which becomes a folder, and refuse one that could lead elsewhere."""
    name = path.stem if config.run.name is None else config.run.name
    if not _RUN_NAME.fullmatch(name):
        origin = f" (from the file {display_path(path)})" if config.run.name is None else ""
        raise ConfigError(
            f"run.name={format_value(name)}{origin} cannot be the name of a folder; use 1 to 64 of "
            "the characters A-Z a-z 0-9 . _ - and begin with a letter, a digit or _",
            "run.name",
        )
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
