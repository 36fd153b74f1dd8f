"""Command lines: train.py's configuration, the settings of the other programs, and `--help`.

A program declares its settings as a flat dataclass, such as `Settings` in generate.py. Comments are
the help, fields without a default are required, `RANGES` maps names to ranges, and `__post_init__`
checks relations.
"""

import contextlib
import dataclasses
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from configs.errors import ConfigError, bad_setting, format_value
from configs.fields import KEYS, SECTIONS, Field, fields_of
from configs.launch import (
    exit_with_error,
    is_rank_zero,
    limit_thread_spinning,
    world_size_from_environment,
)
from configs.load import SHIPPED, parse_arguments, parse_config, read_config
from configs.schema import Config
from configs.validate import validate

HELP = {"--help", "-h", "help"}
_WIDTH = 100
_Settings = TypeVar("_Settings")


def load_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """Return the configuration of a training launch, or exit.

    `--help` and `config=list` print and exit with 0; an error prints one line and exits with 2.
    `num_ranks`: see parse_config.
    """
    limit_thread_spinning()
    if HELP & set(arguments):
        _print_and_exit(usage())
    if "config=list" in arguments:
        _print_and_exit(config_list())
    with exit_on_config_error():
        return parse_config(arguments, num_ranks)


def load_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """Return the settings of a program, or print help or one line of error and exit."""
    limit_thread_spinning()
    if HELP & set(arguments):
        lines = [f"Usage: python {_program(settings_class)} key=value ...", ""]
        lines += [*(inspect.getdoc(settings_class) or "").splitlines(), ""]
        lines += [line for field in fields_of(settings_class).values() for line in _describe(field)]
        _print_and_exit("\n".join([*lines, ""]))
    with exit_on_config_error():
        return parse_settings(settings_class, arguments)


def _print_and_exit(text: str) -> NoReturn:
    if is_rank_zero():
        sys.stdout.write(text)
    raise SystemExit(0)


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Print a ConfigError once for all ranks and exit."""
    try:
        yield
    except ConfigError as error:
        exit_with_error(f"config error: {error}")


def parse_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """Return the settings of a program; ConfigError says what is wrong with them."""
    fields = fields_of(settings_class)
    values = parse_arguments(arguments, fields)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{name}={name.upper()} is required: {field.comment}", name)
    return settings_class(**values)


def _program(settings_class: type[Any]) -> str:
    spec = sys.modules["__main__"].__spec__
    if settings_class.__module__ == "__main__" and spec is not None:
        return f"-m {spec.name.removesuffix('.__main__')}"
    return Path(inspect.getfile(settings_class)).name


def run_config(run: str, tensor_model_parallel_size: int | None = None, **train: Any) -> Config:
    """Return the configuration of a run folder, for inference on the ranks of this launch.

    The tensor-parallel size defaults to the number of ranks; `train` replaces keys of that section.
    The global batch becomes one micro-batch per data-parallel rank.
    """
    path = Path(os.path.expanduser(run), "config.yaml")
    if not path.is_file():
        other = Path("runs", run)
        hint = f"did you mean run={other}? " if (other / "config.yaml").is_file() else ""
        example = "give a folder written by train.py, such as runs/gpt_debug"
        raise bad_setting("run", run, f"is not a run: there is no {path}; {hint}{example}")
    config, num_ranks = read_config(path), world_size_from_environment()
    t = tensor_model_parallel_size or num_ranks
    settings = dataclasses.replace(config.train, device="auto", **train)
    batch = settings.micro_batch_size * max(1, num_ranks // t)
    config = dataclasses.replace(
        config,
        parallel=dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=t,
            context_parallel_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=None,
        ),
        train=dataclasses.replace(settings, global_batch_size=batch),
    )
    validate(config, num_ranks)
    return config


def usage() -> str:
    """Return the help of train.py: all settings and the shipped files."""
    lines = ["Usage: python train.py config=NAME.yaml [section.key=value ...]", ""]
    lines += ["A setting comes from the command line, else the config file, else its default."]
    lines += ["Of a key given twice the last counts. config=runs/NAME/config.yaml has all settings"]
    lines += ["of a run, including its command line.", "All settings, with type and default:"]
    for section, owner in SECTIONS.items():
        lines += ["", f"{section}: {inspect.getdoc(owner)}"]
        for key, field in KEYS.items():
            if key.startswith(f"{section}."):
                lines += _describe(field)
    return "\n".join([*lines, "", config_list()])


def _describe(field: Field) -> list[str]:
    """Return the lines of help about one setting."""
    indent = " " * 6
    comment = textwrap.wrap(field.comment, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    required = field.default is dataclasses.MISSING
    default = "required" if required else f"default {format_value(field.default)}"
    return [f"  {field.name}  ({field.kind}; {default})", *comment]


def settings_table() -> str:
    """Return all settings as a Markdown table, for docs/settings.md."""
    rows = [
        (*key.split("."), field.kind, format_value(field.default), field.comment)
        for key, field in KEYS.items()
    ]
    lines = [("section", "key", "type", "default", "meaning"), ("---",) * 5, *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def config_list() -> str:
    """Return the shipped files, each with the comment in its first line."""
    width = max(len(path.name) for path in SHIPPED)
    lines = [
        f"  {path.name:<{width}}  {path.read_text('utf-8').splitlines()[0].lstrip('# ')}"
        for path in SHIPPED
    ]
    return "\n".join(["Shipped configurations (config=NAME.yaml):", *lines, ""])
