"""The texts of `--help` and `config=list`, taken from the schema's source and the YAML files.

The comment beside a key in `configs/schema.py` is its documentation, so there is one place to keep
right.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from pathlib import Path

from configs import schema
from configs.errors import shown
from configs.keys import KEYS, SECTIONS, Key

SHIPPED: list[Path] = sorted(Path(__file__).parent.glob("*.yaml"))
_WIDTH = 100


def usage() -> str:
    """Returns how to start a program, all keys with type, default and comment, and the files."""
    comments = key_comments()
    lines = ["Usage: python train.py config=NAME.yaml [section.key=value ...]", ""]
    lines += [
        "Settings: defaults < config file < command line. All keys, what they take and default:"
    ]
    for section, section_class in SECTIONS.items():
        lines += ["", f"{section}: {inspect.getdoc(section_class)}"]
        for key in KEYS.values():
            if not key.name.startswith(f"{section}."):
                continue
            lines += describe_key(key, f"default {shown(key.default)}", comments[key.name])
    return "\n".join([*lines, "", config_list()])


def describe_key(key: Key, default: str, comment: str) -> list[str]:
    """Returns the lines about one key: what it takes, its default, and its comment."""
    indent = " " * 6
    comment_lines = textwrap.wrap(comment, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [f"  {key.name}  ({key.allowed}; {default})", *comment_lines]


def config_list() -> str:
    """Returns the shipped files, each with its description."""
    width = max((len(path.name) for path in SHIPPED), default=0)
    lines = [f"  {path.name:<{width}}  {describe(path)}" for path in SHIPPED]
    return "\n".join(["Shipped configurations (config=NAME.yaml):", *lines, ""])


def describe(path: Path) -> str:
    """The first line of a YAML file, which is a comment that describes it."""
    with path.open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()


def key_comments() -> dict[str, str]:
    """Returns the comment of each key."""
    of_classes = field_comments(inspect.getsource(schema))
    return {
        f"{section}.{name}": comment
        for section, section_class in SECTIONS.items()
        for base in section_class.__mro__
        for name, comment in of_classes.get(base.__name__, {}).items()
    }


def field_comments(source: str) -> dict[str, dict[str, str]]:
    """Returns the comments of the fields of each class: behind, or in the lines directly above."""
    behind: dict[int, str] = {}  # by line
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments = alone if token.line.lstrip().startswith("#") else behind
            comments[token.start[0]] = token.string.lstrip("# ")
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {
        node.name: {
            field.target.id: behind.get(field.lineno) or _above(field.lineno, alone)
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        for node in classes
    }


def _above(line: int, alone: dict[int, str]) -> str:
    lines: list[str] = []
    while line - 1 in alone:
        line -= 1
        lines.insert(0, alone[line])
    return " ".join(lines)
