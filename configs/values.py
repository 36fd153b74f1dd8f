"""From YAML to the value of a setting, by the type of its key.

YAML guesses types from how a scalar looks: 010 is eight, 12:30 is 750, off is false, 1e4 is a
string. So the text of a scalar is read by the type of the key, the same way from a file and from
the command line; what looks like another type is refused rather than changed.
"""

import dataclasses
import difflib
import io
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

from configs.errors import ConfigError, format_value
from configs.fields import Field, fields_of

_YAML = "tag:yaml.org,2002:"
_NULL, _NULLS = f"{_YAML}null", {"", "~", "null", "Null", "NULL"}
_PLAIN_TAGS = {_YAML + name for name in ("str", "int", "float", "bool", "null", "timestamp")}
_NUMBER = re.compile(r"[+-]?((?!0[0-9])[0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_MAX_DIGITS = 20  # one more than 2**63 - 1, the largest seed, has


def argument_node(field: Field, text: str) -> yaml.Node:
    """The YAML node of a value on the command line; a string is taken as it is."""
    is_string = field.hint is str
    is_quoted = is_string and len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    if get_origin(field.hint) is tuple or is_quoted:
        try:
            return compose(text) or yaml.ScalarNode(_NULL, text)
        except (yaml.YAMLError, RecursionError):
            raise ConfigError(
                f"{field.name}={format_value(text)} is not valid YAML", field.name
            ) from None
    is_null = text in _NULLS and get_origin(field.hint) is not Annotated
    if is_null and not (is_string and not text):
        return yaml.ScalarNode(_NULL, text)
    return yaml.ScalarNode(f"{_YAML}str", text)


def compose(text: str, source: str = "") -> yaml.Node | None:
    """The YAML nodes of a text; `source` is the file it is from, for errors, empty if none."""
    stream = io.StringIO(text)
    stream.name = source
    return yaml.compose(stream, Loader=yaml.SafeLoader)


def error(node: yaml.Node, message: str, key: str) -> ConfigError:
    """The error about a node, with file and line in front if it is from a file."""
    mark = node.start_mark
    place = f"{mark.name}:{mark.line + 1}: " if mark and mark.name else ""
    return ConfigError(f"{place}{message}", key)


def display(node: yaml.Node) -> str:
    """A node as an error shows it."""
    if isinstance(node, yaml.ScalarNode):
        return format_value(node.value)
    return "{...}" if isinstance(node, yaml.MappingNode) else "[...]"


def mapping_items(mapping: yaml.Node, prefix: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """The full key of each entry of a mapping, its node, and its value; refuses repeated keys."""
    seen: dict[str, yaml.Node] = {}
    for key_node, value in mapping.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise error(key_node, "a key must be one word", prefix)
        key = prefix + key_node.value
        if key in seen:
            line = f" in line {seen[key].start_mark.line + 1}" if key_node.start_mark.name else ""
            raise error(key_node, f"{key} is already set{line}; remove one of the two", key)
        seen[key] = key_node
        yield key, key_node, value


def convert(field: Field, node: yaml.Node) -> Any:
    """The value of a field; ConfigError says what is allowed."""
    if node.tag == _NULL:
        if field.nullable:
            return None
        default = (
            ""
            if field.default is dataclasses.MISSING
            else f" (default {format_value(field.default)})"
        )
        empty = '; an empty string is ""' if field.hint is str else ""
        raise error(
            node, f"{field.name} is null; it must be {field.allowed}{default}{empty}", field.name
        )
    if get_origin(field.hint) is tuple:
        return _sequence(field, node)
    if dataclasses.is_dataclass(field.hint):
        return _mapping(field, node)
    if not isinstance(node, yaml.ScalarNode):
        raise _not_allowed(field, node)
    if node.tag not in _PLAIN_TAGS:
        raise error(
            node, f"{field.name} has the YAML tag {node.tag}; write the plain value", field.name
        )
    return _scalar(field, node)


def _not_allowed(field: Field, node: yaml.Node) -> ConfigError:
    message = f"{field.name}={display(node)} is not {field.allowed}"
    if field.hint in (int, float):
        example = field.default if isinstance(field.default, int | float) else 100
        message += f"; write for example {example}"
    return error(node, message, field.name)


def _sequence(field: Field, node: yaml.Node) -> tuple[Any, ...]:
    hints = get_args(field.hint)
    if not isinstance(node, yaml.SequenceNode):
        raise _not_allowed(field, node)
    if Ellipsis in hints:
        hints = hints[:1] * len(node.value)
    if len(node.value) != len(hints):
        count = f"{len(node.value)} item{'s' * (len(node.value) != 1)}"
        raise error(node, f"{field.name} has {count}; it must be {field.allowed}", field.name)
    return tuple(
        convert(Field(f"{field.name}[{number}]", hint, dataclasses.MISSING), item)
        for number, (hint, item) in enumerate(zip(hints, node.value, strict=True))
    )


def _mapping(field: Field, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise _not_allowed(field, node)
    prefix = f"{field.name}."
    known, values = fields_of(field.hint, prefix), {}
    for key, key_node, value in mapping_items(node, prefix):
        if key not in known:
            leaves = [name.removeprefix(prefix) for name in known]
            near = difflib.get_close_matches(key.removeprefix(prefix), leaves, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(leaves)}"
            raise error(key_node, f"there is no key {key}; {hint}", field.name)
        values[key.removeprefix(prefix)] = convert(known[key], value)
    return field.hint(**values)


def _scalar(field: Field, node: yaml.ScalarNode) -> int | float | str | bool:
    text, hint = node.value, field.hint
    if hint is int:
        return _integer(field, node)
    if hint is float and _NUMBER.fullmatch(text.strip()) and math.isfinite(float(text)):
        return float(text)
    if hint is float and text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
        raise error(
            node,
            f"{field.name}={text} is a percentage; write {Decimal(text[:-1]) / 100:f}",
            field.name,
        )
    if hint is bool and text.strip().lower() in ("true", "false"):
        return bool(text.strip().lower() == "true")
    if get_origin(hint) is Literal and text.strip() in get_args(hint):
        return str(text.strip())
    if hint is str or get_origin(hint) is Annotated:
        _check_string(field, node)
        return str(text)
    raise _not_allowed(field, node)


def _integer(field: Field, node: yaml.ScalarNode) -> int:
    text = re.sub(r"(?<=[0-9])_(?=[0-9])", "", node.value.strip())
    if _NUMBER.fullmatch(text):
        number = Decimal(text)  # exact, where a float would round
        if number.adjusted() > _MAX_DIGITS:
            raise error(node, f"{field.name}={format_value(node.value)} is too large", field.name)
        if number == number.to_integral_value():
            return int(number)
    raise _not_allowed(field, node)


def _check_string(field: Field, node: yaml.ScalarNode) -> None:
    text, problem = node.value, ""
    is_verbatim = get_origin(field.hint) is Annotated
    if field.nullable and text.lower() == "none" and not is_verbatim:
        problem = "is a string; for no value write null"
    if ("${" in text or text == "???") and not is_verbatim:  # OmegaConf would look for a value
        problem = "has a special meaning to OmegaConf; write the value itself"
    try:
        text.encode()
    except UnicodeEncodeError:
        problem = "is not valid UTF-8; write it in UTF-8"
    if problem:
        raise error(node, f"{field.name}={format_value(text)} {problem}", field.name)
