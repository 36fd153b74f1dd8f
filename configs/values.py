"""From the text of a value to the value, by the type of its key.

YAML guesses types from how a text looks: 010 is eight, 12:30 is 750, off is false, 1e4 is a string.
So the text itself is read here, the same way from a file and from the command line, and what YAML
would have changed silently is refused.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import yaml

from configs.errors import ConfigError, shown
from configs.keys import Key, Value

NULLS = {"", "~", "null", "Null", "NULL"}
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9_]+")
_OTHER_BASE = re.compile(r"[+-]?0(x[0-9a-f]+|o[0-7]+|b[01]+)", re.IGNORECASE)
_BASE_60 = re.compile(r"[+-]?[0-9_]+(:[0-9]+)+(\.[0-9]*)?")
_MAX_INTEGER_DIGITS = 19  # of 2**63 - 1, the largest seed


@dataclass(frozen=True)
class Written:
    """A setting as somebody wrote it."""

    key: str
    text: str
    quoted: bool  # quoted text is never null
    place: str  # file:line, or empty for the command line
    node: yaml.Node | None = None  # of a list, what YAML sees in it; None if it is not YAML

    @property
    def file(self) -> str:
        """The file it is from, empty for the command line."""
        return self.place.rpartition(":")[0]

    def error(self, message: str) -> ConfigError:
        """The error with its place in front."""
        return ConfigError(f"{self.place}: {message}" if self.place else message, self.key)


def parse_value(key: Key, written: Written) -> Value:
    """Reads a text as the type of its key; ConfigError says what is allowed."""
    if not written.quoted and written.text in NULLS:
        if key.nullable:
            return None
        hint = ' (an empty text is "")' if key.type is str and not key.choices else ""
        raise written.error(
            f"{key.name} has no value; it needs {key.allowed}, and its default is "
            f"{shown(key.default)}{hint}"
        )
    text = written.text if key.type is str else written.text.strip()
    reason = _REFUSALS[key.type](key, text)
    if reason:
        raise written.error(f"{key.name}={shown(written.text)} {reason}")
    if key.type is int:
        return int(Decimal(text.replace("_", "")))
    if key.type is float:
        return float(text)
    return text.lower() == "true" if key.type is bool else text


def _refuse_integer(key: Key, text: str) -> str | None:
    """Why a text is no whole number, None if it is one; 1e4 is one."""
    plain = f"is not {key.allowed}; write for example {_example(key)}"
    if _INTEGER.fullmatch(text):
        return (
            None
            if len(text) <= _MAX_INTEGER_DIGITS
            else "has too many digits; write a smaller number"
        )
    if reason := _refuse_notation(text):
        return reason
    if not _NUMBER.fullmatch(text):
        return plain
    number = Decimal(text)
    # Before it is made an int: 1e999 would pass every check of the shape.
    if number.adjusted() >= _MAX_INTEGER_DIGITS:
        return "is too large; write a smaller number"
    return None if number == number.to_integral_value() else plain


def _refuse_number(key: Key, text: str) -> str | None:
    if reason := _refuse_notation(text):
        return reason
    if _NUMBER.fullmatch(text):
        return None if math.isfinite(float(text)) else "is too large; write a smaller number"
    if text.endswith("%") and _NUMBER.fullmatch(text[:-1]):
        return f"is a percentage; write the fraction {Decimal(text[:-1]) / 100:f}"
    if re.fullmatch(r"[+-]?\.?(nan|inf|infinity)", text.lower()):
        return f"is not a finite number; write for example {_example(key)}"
    return f"is not {key.allowed}; write for example {_example(key)}"


def _refuse_notation(text: str) -> str | None:
    """Why a number must be written differently, None if there is no doubt about it."""
    if _LEADING_ZERO.fullmatch(text):
        return f"begins with 0, which YAML may read as octal; write {int(text.replace('_', ''))}"
    if _OTHER_BASE.fullmatch(text):
        return f"is not decimal; write {int(text, 0)}"
    if _BASE_60.fullmatch(text):
        return "has colons, which YAML reads as digits of base 60; write a decimal number"
    return None


def _refuse_text(key: Key, text: str) -> str | None:
    if key.choices:
        return None if text in key.choices else f"is not one of {key.allowed}"
    if key.nullable and text.lower() == "none":
        return "is not YAML's word for nothing; write null"
    if "${" in text:
        return "has ${...} in it, which is not looked up here; write the value itself"
    if text == "???":
        return "is OmegaConf's mark for a missing value; write the value itself"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8; write it in UTF-8"
    return None


def _refuse_boolean(key: Key, text: str) -> str | None:
    return None if text.lower() in ("true", "false") else f"is not {key.allowed}"


def _example(key: Key) -> str:
    # A nullable number has no default to show.
    return "100" if key.default is None else shown(key.default)


_REFUSALS: dict[type, Callable[[Key, str], str | None]] = {
    int: _refuse_integer,
    float: _refuse_number,
    str: _refuse_text,
    bool: _refuse_boolean,
}
