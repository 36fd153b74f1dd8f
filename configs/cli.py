"""The settings of a program beside train.py: a flat dataclass, read from `key=value` arguments.

    @dataclass(frozen=True)
    class Settings:
        \"\"\"Continue a prompt with the model of a run.\"\"\"

        run: str  # the folder of a run, such as runs/gpt_debug
        max_new_tokens: int = 100
        RANGES: ClassVar = {"max_new_tokens": Range(1)}

A field without a default is required. Errors and `--help` are made from the class: the comment of a
field is its documentation. Relations between fields are checked in `__post_init__`, as ConfigError.
A key that train.py has too may be written as there: `parallel.tensor_model_parallel_size=2`.
"""

import dataclasses
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import ConfigError, format_value
from configs.fields import KEYS, Field, fields_of
from configs.launch import (
    exit_with_error,
    is_rank_zero,
    limit_thread_spinning,
    world_size_from_environment,
)
from configs.load import HELP, read_config, split_argument
from configs.schema import Config
from configs.suggest import suggest
from configs.usage import describe_field
from configs.validate import Range, validate
from configs.values import argument_node, convert

_Settings = TypeVar("_Settings")


def load_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """The settings of a program; ends the process if there are none.

    `--help` prints and exits with 0; an error prints one line and exits with 2.
    """
    limit_thread_spinning()
    if HELP & set(arguments):
        if is_rank_zero():
            sys.stdout.write(_usage(settings_class))
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
    """The settings of a program; ConfigError says what is wrong with them."""
    fields = fields_of(settings_class)
    ranges: Mapping[str, Range] = getattr(settings_class, "RANGES", {})
    values: dict[str, Any] = {}
    for argument in arguments:  # of a key given twice the last counts
        name, text = _key_and_text(argument, fields, _program(settings_class))
        value = values[name] = convert(fields[name], argument_node(fields[name], text))
        if fields[name].hint is str and value is not None and not value.strip():
            raise ConfigError(f"{name} is empty; give it a value, or leave it out", name)
        if name in ranges and value is not None and value not in ranges[name]:
            raise ConfigError(f"{name}={value} is out of range; it must be {ranges[name]}", name)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{name}={name.upper()} is required: {field.comment}", name)
    return settings_class(**values)


def _usage(settings_class: type[Any]) -> str:
    lines = [f"Usage: python {_program(settings_class)} key=value ...", ""]
    lines += [*(inspect.getdoc(settings_class) or "").splitlines(), ""]
    for field in fields_of(settings_class).values():
        lines += describe_field(field)
    return "\n".join([*lines, ""])


def _program(settings_class: type[Any]) -> str:
    path = Path(inspect.getfile(settings_class))
    return f"-m {path.parent.name}" if path.stem == "__main__" else path.name


def _key_and_text(argument: str, fields: Mapping[str, Field], program: str) -> tuple[str, str]:
    key, text, written = split_argument(argument, fields)
    name = key.rpartition(".")[2] if key in KEYS else key
    if name not in fields:
        keys = f"the keys of {program} are: {', '.join(fields)} (python {program} --help)"
        if meant := suggest(key, fields):
            problem = f"there is no key {key}; did you mean {meant}?"
        elif key in KEYS:
            problem = f"settings of the run come from its config.yaml; {keys}"
        else:
            problem = f"there is no key {key}; {keys}"
        raise ConfigError(f"{key}={format_value(text)}: {problem}")
    if key != written:
        raise ConfigError(f"{format_value(argument)} has dashes; write {key}={format_value(text)}")
    return name, text


def run_config(run: str, tensor_model_parallel_size: int | None = None, **train: Any) -> Config:
    """The configuration of the run in a folder, for the number of ranks of this launch.

    The tensor-parallel size is the number of ranks unless given; `train` replaces keys of that
    section. The batch of training has no meaning here and becomes one micro-batch per rank. Raises
    ConfigError if the folder is not a run, or if the model does not divide over the ranks.
    """
    path = Path(os.path.expanduser(run), "config.yaml")
    if not path.is_file():
        other = Path("runs", run)
        hint = f"did you mean run={other}? " if (other / "config.yaml").is_file() else ""
        raise ConfigError(
            f"run={format_value(run)} is not a run: there is no {path}; {hint}give the folder that "
            "train.py has written, such as runs/gpt_debug",
            "run",
        )
    config, num_ranks = read_config(path), world_size_from_environment()
    t = tensor_model_parallel_size or num_ranks
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=t)
    settings = dataclasses.replace(config.train, device="auto", **train)
    batch = settings.micro_batch_size * max(1, num_ranks // t)
    settings = dataclasses.replace(settings, global_batch_size=batch)
    config = dataclasses.replace(config, parallel=parallel, train=settings)
    validate(config, num_ranks)
    return config
