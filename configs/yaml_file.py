"""Reading a YAML file into settings as they were written, each with its line.

Only the node tree is used, never YAML's own conversion to values (see `configs/values.py`), and no
tag can make an object.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from configs.errors import ConfigError, os_error_text, shown
from configs.keys import KEYS, SECTIONS
from configs.unknown import explain_section, explain_unknown
from configs.values import Written

# What YAML finds out about a scalar by itself; any other tag was asked for.
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp")
}


def read_yaml(path: Path) -> list[Written]:
    """Returns the settings of a file in order; an empty file has none.

    Raises ConfigError, naming file and line, for what is not YAML, not in two levels, or unknown.
    """
    file = display_path(path)
    root = _compose(path, file)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{_place(file, root)}: this is not a mapping of sections; write for example "
            "'train:' and below it, indented, 'train_steps: 100'"
        )
    return [
        written
        for section, node in mapping_items(root, "", file)
        for written in _section_settings(section, node, file)
    ]


def display_path(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def unquote(text: str) -> str | None:
    """The text inside a quoted YAML scalar, with its escapes; None if it is not well quoted."""
    node = compose_text(text)
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None


def compose_text(text: str) -> yaml.Node | None:
    """The node of a text that may be YAML; None if it is not."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return None


def _compose(path: Path, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text("utf-8-sig"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {os_error_text(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    except RecursionError as error:
        raise ConfigError(f"{file}: is nested too deeply; sections hold plain values") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise ConfigError(f"{file}{line}: is not valid YAML: {error.problem}{hint}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: is not valid YAML: {reason}") from error


def _section_settings(section: str, node: yaml.Node, file: str) -> Iterator[Written]:
    place = _place(file, node)
    if section not in SECTIONS:
        raise ConfigError(f"{place}: {_explain_section_name(section, node)}")
    if isinstance(node, yaml.ScalarNode) and node.value in ("", "~", "null"):
        return  # all keys of the section are commented out
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place}: {explain_section(section, described(node))}")
    for key, value in mapping_items(node, f"{section}.", file):
        yield _written(key, value, _place(file, value))


def described(node: yaml.Node) -> str:
    """What an error shows of a node."""
    if isinstance(node, yaml.ScalarNode):
        return shown(node.value)
    return "{...}" if isinstance(node, yaml.MappingNode) else "[...]"


def _explain_section_name(section: str, node: yaml.Node) -> str:
    if section not in KEYS:
        return explain_unknown(section, described(node))
    name, leaf = section.split(".")
    return (
        f"{section} is written with a dot; in a file write '{name}:' and below it, indented, "
        f"'{leaf}: VALUE'"
    )


def _written(key: str, value: yaml.Node, place: str) -> Written:
    if key not in KEYS:
        raise ConfigError(f"{place}: {explain_unknown(key, described(value))}")
    if KEYS[key].count is not None:
        return Written(key, "", quoted=False, place=place, node=value)
    if not isinstance(value, yaml.ScalarNode):
        raise ConfigError(
            f"{place}: {key}={described(value)} is not one value; write {KEYS[key].allowed}"
        )
    if value.tag not in PLAIN_TAGS:
        raise ConfigError(f"{place}: {key} has the YAML tag {value.tag}; write the plain value")
    return Written(key, value.value, quoted=value.style is not None, place=place)


def mapping_items(
    mapping: yaml.MappingNode, prefix: str, file: str
) -> Iterator[tuple[str, yaml.Node]]:
    """The full key and the value of each entry; refuses an entry that is there twice."""
    lines: dict[str, int] = {}
    for key_node, value in mapping.value:
        line = key_node.start_mark.line + 1
        where = f"{file}:{line}: " if file else ""
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}a key must be one word")
        key = prefix + key_node.value
        if key in lines:
            raise ConfigError(
                f"{where}{key} is already set in line {lines[key]}; remove one of the two"
            )
        lines[key] = line
        yield key, value


def _place(file: str, node: yaml.Node) -> str:
    return f"{file}:{node.start_mark.line + 1}"
