"""The texts of `--help` and `config=list`, from the schema's comments and the YAML files."""

import dataclasses
import inspect
import textwrap
from pathlib import Path

from configs.errors import format_value
from configs.fields import KEYS, SECTIONS, Field

SHIPPED: list[Path] = sorted(Path(__file__).parent.glob("*.yaml"))
_WIDTH = 100


def usage() -> str:
    """How to start train.py, all keys with type, default and comment, and the shipped files."""
    lines = ["Usage: python train.py config=NAME.yaml [section.key=value ...]", ""]
    lines += ["Settings: defaults < config file < command line. All keys, with type and default:"]
    for section, owner in SECTIONS.items():
        lines += ["", f"{section}: {inspect.getdoc(owner)}"]
        for key, field in KEYS.items():
            if key.startswith(f"{section}."):
                lines += describe_field(field)
    return "\n".join([*lines, "", config_list()])


def describe_field(field: Field) -> list[str]:
    """The lines about one setting: what it takes, its default, and its comment."""
    required = field.default is dataclasses.MISSING
    default = "required" if required else f"default {format_value(field.default)}"
    indent = " " * 6
    comment = textwrap.wrap(field.comment, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [f"  {field.name}  ({field.allowed}; {default})", *comment]


def config_list() -> str:
    """The shipped files, each with its first line, which is a comment that describes it."""
    width = max(len(path.name) for path in SHIPPED)
    lines = [
        f"  {path.name:<{width}}  {path.read_text('utf-8').splitlines()[0].lstrip('# ')}"
        for path in SHIPPED
    ]
    return "\n".join(["Shipped configurations (config=NAME.yaml):", *lines, ""])
