"""Settings read from the source of a dataclass, and conversion of text to their types.

YAML guesses types from how a scalar looks: 010 is eight, off is false, 1e4 is a string. We keep the
text of a scalar and convert it by the type of its key, strictly, in files and on the command line.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING
from decimal import Decimal
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from configs.errors import ConfigError, bad_setting, format_value, nearest, suggest
from configs.schema import Config, Range

# A string taken literally: null, quotes and escapes have no special meaning.
Text = Annotated[str, "literal"]

_TYPES = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
_LARGEST_INTEGER = 2**63 - 1
_MOST_DIGITS = 1000  # of an integer; Python refuses to print more than 4300
_NUMBER = re.compile(r"[+-]?((?!0[0-9])[0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting, such as `optimizer.lr`."""

    name: str
    hint: Any  # type, without None and Annotated
    default: Any  # MISSING: required
    nullable: bool = False
    markers: tuple[Any, ...] = ()  # those of Annotated
    owner: type[Any] | None = None  # the dataclass

    @property
    def comment(self) -> str:
        """The comment in the source of the dataclass, or nothing."""
        comments = _comments(self.owner) if self.owner else {}  # type: ignore[arg-type]  # hashable
        return comments.get(self.name.rpartition(".")[2], "")

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        return _describe(self.hint) + (" or null" if self.nullable else "")

    @property
    def kind(self) -> str:
        """The type in words, without articles."""
        return re.sub(r"\b(an?|finite) ", "", self.allowed)

    @property
    def words(self) -> tuple[str, ...]:
        """The allowed words, if it takes one of several."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else ()

    @property
    def range(self) -> Range | None:
        """The allowed range of a number."""
        return next((marker for marker in self.markers if isinstance(marker, Range)), None)


def _describe(hint: Any) -> str:
    items = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(items)}"
    if get_origin(hint) is tuple:
        return f"a list [{', '.join('...' if i is Ellipsis else _describe(i) for i in items)}]"
    if dataclasses.is_dataclass(hint):
        return f"a mapping {{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return _TYPES[hint]


def fields_of(owner: type[Any], prefix: str = "") -> dict[str, Field]:
    """Return the fields of a dataclass by name, with `prefix` before each name."""
    hints = get_type_hints(owner, include_extras=True)
    ranges: Mapping[str, Range] = getattr(owner, "RANGES", {})
    found = {}
    for field in dataclasses.fields(owner):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if nullable := NoneType in get_args(hint):
            hint = get_args(hint)[0]
        markers: tuple[Any, ...] = (ranges[field.name],) if field.name in ranges else ()
        if get_origin(hint) is Annotated:
            hint, markers = get_args(hint)[0], get_args(hint)[1:]
        found[name] = Field(name, hint, field.default, nullable, markers, owner)
    return found


@functools.cache
def _comments(owner: type[Any]) -> dict[str, str]:
    """Return the comment of each field: the one behind it, or the comment lines above it."""
    comments: dict[str, str] = {}
    for base in reversed(owner.__mro__[:-1]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            code, mark, comment = map(str.strip, line.partition("#"))
            if mark and not code:
                above.append(comment)
                continue
            if field := re.match(r"(\w+): ", code):
                comments[field[1]] = comment or " ".join(above)
            above.clear()
    return comments


def flatten(config: Config) -> dict[str, Any]:
    """Return every setting as `section.key` and a value that JSON can represent."""
    return {
        f"{section}.{leaf}": list(value) if isinstance(value, tuple) else value
        for section, settings in dataclasses.asdict(config).items()
        for leaf, value in settings.items()
    }


def unknown_key(name: str, value: object, fields: Mapping[str, Field]) -> ConfigError:
    """Return the error for a key that does not exist, with the nearest existing one."""
    section = name.rpartition(".")[0] or name
    siblings = [key for key in fields if key.startswith(f"{section}.")]
    if name == section and siblings:
        fix = f"set its keys, such as {siblings[0]}, or choose a file with config=NAME.yaml"
        return bad_setting(name, value, f"gives a value to a section; {fix}")
    if meant := suggest(name, fields):
        word = nearest(str(value), fields[meant].words) if meant in fields else None
        fix = f"did you mean {meant}={word}?" if word else f"did you mean {meant}?"
    elif siblings:
        fix = f"the keys of {section} are: {', '.join(k.rpartition('.')[2] for k in siblings)}"
    else:
        names = dict.fromkeys(key.partition(".")[0] for key in fields)
        fix = f"choose from {', '.join(names)} (--help describes them)"
    return ConfigError(f"{name}={format_value(value)}: there is no key {name}; {fix}", name)


def convert(field: Field, value: object) -> Any:
    """Convert text, null, or lists and mappings of these to a field's type; else ConfigError."""
    name, hint = field.name, field.hint
    if value is None and field.nullable:
        return None
    value = [value] if hint == tuple[str, ...] and isinstance(value, str) else value
    if get_origin(hint) is tuple and isinstance(value, list):
        hints = get_args(hint)
        hints = hints[:1] * len(value) if Ellipsis in hints else hints
        if len(hints) == len(value):
            items = [Field(f"{name}[{i}]", item_hint, MISSING) for i, item_hint in enumerate(hints)]
            return tuple(convert(item, value[i]) for i, item in enumerate(items))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _convert_mapping(hint, name, value)
    converted: Any = _convert_scalar(field, value) if isinstance(value, str) else None
    if converted is None:
        raise bad_setting(name, value, f"is not {field.allowed}{_fix(field, value)}")
    if field.range is not None and converted not in field.range:
        raise bad_setting(name, converted, f"is out of range; it must be {field.range}")
    if type(converted) is int and abs(converted) > _LARGEST_INTEGER:
        raise bad_setting(name, value, "is too large")
    return converted


def _convert_mapping(owner: type[Any], name: str, mapping: dict[Any, object]) -> Any:
    """Convert a mapping to a dataclass."""
    fields = fields_of(owner, f"{name}.")
    for key, value in mapping.items():
        leaf, colon, rest = str(key).partition(":")
        if colon and value is None and f"{name}.{leaf}" in fields:
            raise ConfigError(f"{name} has {key}; write '{leaf}: {rest}', with a space", name)
        if f"{name}.{key}" not in fields:
            raise unknown_key(f"{name}.{key}", value, fields)
    return owner(**{key: convert(fields[f"{name}.{key}"], mapping[key]) for key in mapping})


def _convert_scalar(field: Field, text: str) -> int | float | str | bool | None:
    """Convert the text of a scalar to the type of a field; None if it does not fit."""
    if field.hint is str:
        _check_string(field, text)
        return text
    text = text.strip()
    if field.hint is bool:
        return {"true": True, "false": False}.get(text.lower())
    if field.words:
        return text if text in field.words else None
    if field.hint not in (int, float) or not _NUMBER.fullmatch(text):
        return None
    number = Decimal(text)  # exact, where a float would round
    if field.hint is int and number.adjusted() > _MOST_DIGITS:
        raise bad_setting(field.name, text, "is too large")
    if field.hint is int:
        return int(number) if number == number.to_integral_value() else None
    return float(number) if math.isfinite(float(number)) else None


def _check_string(field: Field, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_setting(field.name, text, "is not valid UTF-8; write it in UTF-8") from None
    if "literal" in field.markers:
        return
    if not text.strip() and "may be empty" not in field.markers:
        fix = "give a value or null" if field.nullable else "give a value"
        raise ConfigError(f"{field.name} is empty; {fix}", field.name)
    if field.nullable and text.lower() == "none":
        raise bad_setting(field.name, text, "is a string; for no value write null")
    if "${" in text or text == "???":
        problem = "has a special meaning to OmegaConf; write the value itself"
        raise bad_setting(field.name, text, problem)


def _fix(field: Field, value: object) -> str:
    """Return how to write a value of a field, for an error."""
    if field.hint in (int, float):
        if str(value).endswith("%") and _NUMBER.fullmatch(str(value)[:-1]):
            return f"; write {Decimal(str(value)[:-1]) / 100:f}"
        example = field.default if isinstance(field.default, int | float) else 100
        return f"; write for example {example}"
    word = nearest(str(value), field.words)
    return f"; did you mean {word}?" if word else ""


SECTIONS: dict[str, type[Any]] = get_type_hints(Config)
KEYS: dict[str, Field] = {
    name: field
    for section, owner in SECTIONS.items()
    for name, field in fields_of(owner, f"{section}.").items()
}
