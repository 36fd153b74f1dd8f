"""The settings of a program beside train.py: a flat dataclass, read from `key=value` arguments.

    @dataclass(frozen=True)
    class Settings:
        \"\"\"Continue a prompt with the model of a run.\"\"\"

        run: str  # the folder of a run, such as runs/gpt_debug
        max_new_tokens: int = 100
        RANGES: ClassVar = {"max_new_tokens": Range(1)}

A field without a default is required. Errors and `--help` are made from the class: the comment of a
field is its documentation. Relations between fields are for its `__post_init__`, as ConfigError.
What is also a key of train.py may be written as there: `parallel.tensor_model_parallel_size=2`.
"""

import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from configs.errors import ConfigError, shown
from configs.keys import KEYS, Key, Value, keys_of
from configs.launch import exit_with_error, is_rank_zero, world_size_from_environment
from configs.load import HELP, read_config
from configs.schema import Config
from configs.usage import describe_key, field_comments
from configs.validate import Range, validate
from configs.values import Written, parse_value

# Taken as it is written: no word for null, no quotes, no escapes.
Text = Annotated[str, "verbatim"]

_Settings = TypeVar("_Settings")
_SIMILARITY = 0.6  # difflib's ratio from which a key counts as a misspelling

# What others call our keys; those that a program has count.
_ALIASES: dict[str, tuple[str, ...]] = {
    "batch_size": ("micro_batch_size", "num_samples"),
    "checkpoint": ("step", "run"),
    "data": ("path",),
    "dataset": ("path",),
    "directory": ("output", "run"),
    "dtype": ("precision",),
    "file": ("path", "output"),
    "folder": ("output", "run"),
    "input": ("prompt", "path", "source"),
    "length": ("max_new_tokens",),
    "max_length": ("max_new_tokens",),
    "model": ("source", "run"),
    "n": ("num_samples",),
    "name": ("run",),
    "num_return_sequences": ("num_samples",),
    "num_tokens": ("max_new_tokens",),
    "out": ("output",),
    "precision": ("dtype",),
    "temp": ("temperature",),
    "text": ("prompt", "path"),
    "tp": ("tensor_model_parallel_size",),
    "tp_size": ("tensor_model_parallel_size",),
}


def load_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """Returns the settings of a program, or ends the process.

    `--help` prints and exits with 0; anything wrong prints a line and exits with 2.
    """
    if HELP & set(arguments):
        if is_rank_zero():
            sys.stdout.write(usage_of(settings_class))
        raise SystemExit(0)
    with exit_on_config_error():
        return parse_settings(settings_class, arguments)


@contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Within it, a ConfigError is printed once for all ranks and ends the process."""
    try:
        yield
    except ConfigError as error:
        exit_with_error(f"config error: {error}")


def parse_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """Returns the settings of a program; ConfigError says what is wrong with them."""
    keys = keys_of(settings_class)
    given: dict[str, str] = {}  # of a key given twice the last counts, as for train.py
    for argument in arguments:
        name, text = _name_and_text(argument, keys, _program(settings_class))
        given[name] = text
    hints = get_type_hints(settings_class, include_extras=True)
    values: dict[str, Any] = {
        name: _value(keys[name], text, hints[name]) for name, text in given.items()
    }
    for name, key in keys.items():
        if key.default is dataclasses.MISSING and name not in values:
            comment = _comments(settings_class)[name]
            raise ConfigError(f"{name}={name.upper()} is required: {comment}", name)
    ranges: dict[str, Range] = getattr(settings_class, "RANGES", {})
    for name, allowed in ranges.items():
        if values.get(name) is not None and values[name] not in allowed:
            raise ConfigError(f"{name}={values[name]} is out of range; it must be {allowed}", name)
    return settings_class(**values)


def usage_of(settings_class: type[Any]) -> str:
    """Returns how to start a program, and all its keys with type, default and comment."""
    comments = _comments(settings_class)
    lines = [f"Usage: python {_program(settings_class)} key=value ...", ""]
    lines += [*(inspect.getdoc(settings_class) or "").splitlines(), ""]
    for key in keys_of(settings_class).values():
        required = key.default is dataclasses.MISSING
        default = "required" if required else f"default {shown(key.default)}"
        lines += describe_key(key, default, comments[key.name])
    return "\n".join([*lines, ""])


def run_config(run: str, tensor_model_parallel_size: int | None = None, **train: Any) -> Config:
    """Returns the configuration of the run in a folder, for the ranks there are.

    The tensor-parallel size is the number of ranks unless given; `train` replaces keys of that
    section. The batch of training has no meaning here and becomes one micro-batch a rank. Raises
    ConfigError if the folder is no run, or the model does not divide over the ranks.
    """
    path = Path(os.path.expanduser(run), "config.yaml")
    if not path.is_file():
        hint = ""
        if Path("runs", run, "config.yaml").is_file():
            hint = f"did you mean run=runs/{run}? "
        raise ConfigError(
            f"run={shown(run)} is no run: there is no {path}; {hint}give the folder that train.py "
            "has written, such as runs/gpt_debug",
            "run",
        )
    config, num_ranks = read_config(path), world_size_from_environment()
    t = tensor_model_parallel_size or num_ranks
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=t)
    settings = dataclasses.replace(config.train, **train)
    batch = settings.micro_batch_size * max(1, num_ranks // t)
    settings = dataclasses.replace(settings, global_batch_size=batch)
    config = dataclasses.replace(config, parallel=parallel, train=settings)
    validate(config, num_ranks)
    return config


def _program(settings_class: type[Any]) -> str:
    return Path(inspect.getfile(settings_class)).name


def _comments(settings_class: type[Any]) -> dict[str, str]:
    source = Path(inspect.getfile(settings_class)).read_text("utf-8")
    return field_comments(source)[settings_class.__name__]


def _name_and_text(argument: str, keys: dict[str, Key], program: str) -> tuple[str, str]:
    written, equals, text = argument.partition("=")
    written = written.strip()
    bare = written.lstrip("-")
    leaf = bare.rpartition(".")[2] if bare in KEYS else bare
    if not equals:
        if leaf in keys:
            fix = f"write {leaf}=VALUE, without spaces or dashes"
        elif os.path.isdir(argument) and "run" in keys:
            fix = f"write run={argument}"
        else:
            fix = f"write key=value, without spaces or dashes (all keys: python {program} --help)"
        raise ConfigError(f"{shown(argument)} has no '='; {fix}")
    if leaf not in keys:
        raise ConfigError(f"{bare}={shown(text)}: {_explain_unknown(bare, keys, program)}")
    if written != bare:
        raise ConfigError(f"{shown(argument)} has dashes; write {bare}={shown(text)}")
    return leaf, text


def _explain_unknown(name: str, keys: dict[str, Key], program: str) -> str:
    """What was meant by a key that a program does not have, or which ones there are."""
    leaf = name.rpartition(".")[2].lower().replace("-", "_")
    meant = [alias for alias in _ALIASES.get(leaf, ()) if alias in keys]
    if leaf in keys:
        meant = [leaf]
    if nearest := meant or difflib.get_close_matches(leaf, keys, n=1, cutoff=_SIMILARITY):
        return f"there is no key {name}; did you mean {nearest[0]}?"
    all_keys = f"the keys of {program} are: {', '.join(keys)} (python {program} --help)"
    if name in KEYS:
        return f"settings of the run are those of its config.yaml and stay; {all_keys}"
    return f"there is no key {name}; {all_keys}"


def _value(key: Key, text: str, hint: Any) -> Value:
    written = Written(key.name, text, quoted=not text and key.type is str, place="")
    if Text in (hint, *get_args(hint)):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise written.error(f"{key.name} is not valid UTF-8; write it in UTF-8") from None
        return text
    value = parse_value(key, written)
    if isinstance(value, str) and not value.strip():
        raise written.error(f"{key.name} is empty; give it a value, or leave it out")
    return value
