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
from configs.keys import KEYS, SECTIONS

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
            lines.append(f"  {key.name}  ({key.allowed}; default {shown(key.default)})")
            comment = comments[key.name]
            indent = " " * 6
            lines += textwrap.wrap(comment, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([*lines, "", config_list()])


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
    """Returns the comment of each key: behind it, or else in the lines directly above it."""
    source = inspect.getsource(schema)
    behind: dict[int, str] = {}  # by line
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments = alone if token.line.lstrip().startswith("#") else behind
            comments[token.start[0]] = token.string.lstrip("# ")
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return {
        f"{section}.{field.target.id}": behind.get(field.lineno) or _above(field.lineno, alone)
        for section, section_class in SECTIONS.items()
        for base in section_class.__mro__
        if base.__name__ in classes
        for field in classes[base.__name__].body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _above(line: int, alone: dict[int, str]) -> str:
    lines: list[str] = []
    while line - 1 in alone:
        line -= 1
        lines.insert(0, alone[line])
    return " ".join(lines)
