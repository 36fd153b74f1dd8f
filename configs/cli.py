"""The command line of train.py and its `--help`."""

import contextlib
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import NoReturn

from configs.errors import ConfigError, format_value
from configs.fields import KEYS, SECTIONS, Field
from configs.launch import exit_with_error, is_rank_zero, set_up_environment
from configs.load import SHIPPED, parse_config
from configs.schema import Config

HELP = {"--help", "-h", "help"}
_WIDTH = 100


def load_config(arguments: list[str], num_ranks: Callable[[Config], int] | None = None) -> Config:
    """Return the configuration of a training launch, or exit.

    `--help` and `config=list` print and exit with 0; an error prints one line and exits with 2.
    `num_ranks`: see parse_config.
    """
    set_up_environment()
    if HELP & set(arguments):
        print_and_exit(usage())
    if "config=list" in arguments:
        print_and_exit(config_list())
    with exit_on_config_error():
        return parse_config(arguments, num_ranks)


def print_and_exit(text: str) -> NoReturn:
    """Print information once for all ranks and exit with 0."""
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


def usage() -> str:
    """Return the help of train.py: all settings and the shipped files."""
    lines = ["Usage: python train.py config=NAME.yaml [section.key=value ...]", ""]
    lines += ["A setting comes from the command line, else the config file, else its default."]
    lines += ["Of a key given twice the last counts. config=runs/NAME/config.yaml has all settings"]
    lines += ["of a run, including its command line; it is the default if run.init_from is given."]
    lines += ["All settings, with type and default:"]
    for section, owner in SECTIONS.items():
        lines += ["", f"{section}: {inspect.getdoc(owner)}"]
        for key, field in KEYS.items():
            if key.startswith(f"{section}."):
                lines += describe(field)
    return "\n".join([*lines, "", config_list()])


def describe(field: Field) -> list[str]:
    """Return the lines of help about one setting."""
    indent = " " * 6
    comment = textwrap.wrap(field.comment, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    required = field.default is dataclasses.MISSING
    default = "required" if required else f"default {format_value(field.default)}"
    return [f"  {field.name}  ({field.kind}; {default})", *comment]


def config_list() -> str:
    """Return the shipped files, each with the comment in its first line."""
    width = max(len(path.name) for path in SHIPPED)
    lines = [
        f"  {path.name:<{width}}  {path.read_text('utf-8').splitlines()[0].lstrip('# ')}"
        for path in SHIPPED
    ]
    return "\n".join(["Shipped configurations (config=NAME.yaml):", *lines, ""])
