"""From a command line to a checked `Config`: defaults < config=NAME.yaml < section.key=value."""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import yaml
from omegaconf import OmegaConf

from configs.errors import ConfigError, shown
from configs.inputs import check_inputs
from configs.keys import KEYS, SECTIONS, Value
from configs.launch import exit_with_error, is_rank_zero, world_size_from_environment
from configs.lists import parse_setting
from configs.schema import Config
from configs.unknown import explain_section, explain_unknown
from configs.usage import SHIPPED, config_list, usage
from configs.validate import validate
from configs.values import Written
from configs.yaml_file import compose_text, display_path, read_yaml, unquote

HELP = {"--help", "-h", "help"}
_RUN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def load_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """Returns the configuration of a training launch, or ends the process.

    `--help` and `config=list` print and exit with 0; anything wrong prints a line and exits with 2.
    `num_ranks`: see parse_config.
    """
    if text := _information(arguments):
        if is_rank_zero():
            sys.stdout.write(text)
        raise SystemExit(0)
    try:
        return parse_config(arguments, num_ranks)
    except ConfigError as error:
        exit_with_error(f"config error: {error}")


def parse_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """Returns the configuration, checked against the ranks and files there are, or ConfigError.

    With `num_ranks` against so many ranks as it says, and no files: for who asks what would be.
    """
    name, overrides = _split(arguments)
    path = _find(name)
    from_file = read_yaml(path)
    config = _merge(from_file, overrides)
    try:
        config = _with_run_name(config, path)
        validate(config, num_ranks(config) if num_ranks else world_size_from_environment())
        if num_ranks is None:
            check_inputs(config)
    except ConfigError as error:
        place = _place(error, from_file, overrides)
        raise ConfigError(f"{place}: {error}" if place else str(error), error.key) from error
    return config


def read_config(path: Path) -> Config:
    """Returns the configuration in a file, such as a run folder's, whatever ranks there are.

    Types and ranges are checked; ranks and input files are not, as an evaluation needs neither.
    """
    config = _with_run_name(_merge(read_yaml(path), []), path)
    validate(config, config.parallel.tensor_model_parallel_size)
    return config


def to_yaml(config: Config) -> str:
    """Returns the text of a YAML file that reads back as the same configuration."""
    text: str = yaml.safe_dump(
        dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=sys.maxsize
    )
    return f"# The settings of run {config.run.name}, all of them.\n{text}"


def _place(error: ConfigError, from_file: list[Written], overrides: list[Written]) -> str:
    """The file and line to change, empty if the command line had a part in the error."""
    wrong, _, _ = str(error).partition(";")
    if any(_names(wrong, written.key) for written in overrides):
        return ""
    places = {written.key: written.place for written in from_file}
    # The key to change may have its default; then another one in the error shows where to look.
    mentioned = (place for key, place in places.items() if _names(wrong, key))
    return places.get(error.key or "") or next(mentioned, "")


def _names(message: str, key: str) -> bool:
    """Whether a message is about a value of the key, or of an item of the list it is."""
    return f"{key}=" in message or f"{key}[" in message


def _information(arguments: list[str]) -> str | None:
    if HELP & set(arguments):
        return usage()
    return config_list() if "config=list" in arguments else None


def _split(arguments: list[str]) -> tuple[str, list[Written]]:
    """Takes the command line apart into the config's name and the settings after it.

    Of a key given twice the last counts, so that a script can add to a command line. Two configs
    are a mistake: the second would be another run altogether.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, value = _key_and_value(argument)
        if key == "config" and key in given:
            both = f"{shown(given[key])} and {shown(value)}"
            raise ConfigError(f"config is given twice, as {both}; give one")
        given[key] = value
    if not given.get("config"):
        raise ConfigError(f"config=NAME.yaml is required; {_shipped_names()}")
    name = given.pop("config")
    return name, [_written(key, text) for key, text in given.items()]


def _key_and_value(argument: str) -> tuple[str, str]:
    key, equals, value = argument.partition("=")
    key = key.strip()
    bare = key.lstrip("-")
    if not equals:
        raise ConfigError(_explain_bare_word(argument, bare))
    if bare in SECTIONS:
        raise ConfigError(explain_section(bare, shown(value)))
    if bare != "config" and bare not in KEYS:
        raise ConfigError(explain_unknown(bare, shown(value)))
    if key != bare:
        raise ConfigError(f"{argument} has dashes; write {bare}={shown(value)}")
    return key, value


def _explain_bare_word(argument: str, bare: str) -> str:
    """What to write instead of an argument without '='."""
    if Path(argument).stem in {path.stem for path in SHIPPED} or argument.endswith(".yaml"):
        fix = f"write config={argument}"
    elif bare == "config":
        fix = "write config=NAME.yaml, without spaces or dashes"
    elif bare in KEYS:
        fix = f"write {bare}={shown(KEYS[bare].default)} or another value, without spaces or dashes"
    else:
        fix = "write section.key=value, without spaces or dashes (all keys: --help)"
    return f"{shown(argument)} has no '='; {fix}"


def _written(key: str, text: str) -> Written:
    if KEYS[key].count is not None:
        return Written(key, text, quoted=False, place="", node=compose_text(text))
    # Quotes that reach us are meant for YAML: "a\n" has an escape in it, "null" is a text.
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        inside = unquote(text)
        if inside is None:
            raise ConfigError(f"{key}={shown(text)} is not well quoted; leave the quotes out", key)
        return Written(key, inside, quoted=True, place="")
    return Written(key, text, quoted=not text and KEYS[key].type is str, place="")


def _find(name: str) -> Path:
    """The file that config=NAME means: as given, then a shipped one; .yaml may be left out."""
    folder = Path(__file__).parent
    given = Path(os.path.expanduser(name))
    for path in (given, Path(f"{given}.yaml"), folder / given, folder / f"{given}.yaml"):
        if os.path.isfile(path):  # unlike Path.is_file, false for a name that is too long
            return path
    nearest = difflib.get_close_matches(given.stem, [path.stem for path in SHIPPED], n=1)
    hint = f"did you mean config={nearest[0]}.yaml? " if nearest else ""
    raise ConfigError(
        f"config={shown(name)} is no file here or in configs/; {hint}{_shipped_names()}"
    )


def _shipped_names() -> str:
    return f"shipped: {', '.join(path.name for path in SHIPPED)} (config=list describes them)"


def _merge(from_file: Iterable[Written], overrides: Iterable[Written]) -> Config:
    layers = []
    for settings in (from_file, overrides):
        layer: dict[str, dict[str, Value]] = {section: {} for section in SECTIONS}
        for written in settings:
            section, leaf = written.key.split(".")
            layer[section][leaf] = parse_setting(KEYS[written.key], written)
        layers.append(layer)
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), *layers)))


def _with_run_name(config: Config, path: Path) -> Config:
    """Fills in the run's name, which becomes a folder, and refuses what could lead elsewhere."""
    name = path.stem if config.run.name is None else config.run.name
    if not _RUN_NAME.fullmatch(name):
        origin = f" (from the file {display_path(path)})" if config.run.name is None else ""
        raise ConfigError(
            f"run.name={shown(name)}{origin} cannot be the name of a folder; use 1 to 64 of the "
            "characters A-Z a-z 0-9 . _ - and begin with a letter, a digit or _",
            "run.name",
        )
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
