"""The settings of a dataclass, read off its source: name, type, default and comment.

The comment beside or above a field is its documentation; `--help` prints it.
"""

import ast
import dataclasses
import inspect
import io
import tokenize
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from configs.schema import Config

# A string taken verbatim: no word for null, no quotes, no escapes.
Text = Annotated[str, "verbatim"]

_WORDS = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting, such as `optimizer.lr`."""

    name: str
    hint: Any  # its type hint, without None
    default: Any  # dataclasses.MISSING: it must be given
    nullable: bool = False
    comment: str = ""

    @property
    def allowed(self) -> str:
        """What may be written for it, in words."""
        return _describe(self.hint) + (" or null" if self.nullable else "")


def _describe(hint: Any) -> str:
    items = get_args(hint)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(items)}"
    if get_origin(hint) is tuple:
        return f"a list [{', '.join('...' if i is Ellipsis else _describe(i) for i in items)}]"
    if get_origin(hint) is Annotated:
        return _describe(items[0])
    if dataclasses.is_dataclass(hint):
        return f"a mapping {{{', '.join(field.name for field in dataclasses.fields(hint))}}}"
    return _WORDS[hint]


def fields_of(owner: type[Any], prefix: str = "") -> dict[str, Field]:
    """The fields of a dataclass by the names under which they are set, each after `prefix`."""
    hints, comments = get_type_hints(owner, include_extras=True), _comments(owner)
    found = {}
    for field in dataclasses.fields(owner):
        arguments = get_args(hints[field.name])
        nullable = NoneType in arguments
        hint = arguments[0] if nullable else hints[field.name]
        name = f"{prefix}{field.name}"
        found[name] = Field(name, hint, field.default, nullable, comments.get(field.name, ""))
    return found


def _comments(owner: type[Any]) -> dict[str, str]:
    """The comment of each field: behind it, or the lines of comment directly above it."""
    comments: dict[str, str] = {}
    for base in reversed(owner.__mro__[:-1]):
        source = inspect.getsource(base)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = last = node.lineno
                while first - 1 in lines and lines[first - 1].line.lstrip().startswith("#"):
                    first -= 1
                numbers = [last] if last in lines else range(first, last)
                comments[node.target.id] = " ".join(lines[n].string.lstrip("# ") for n in numbers)
    return comments


def flatten(config: Config) -> dict[str, Any]:
    """Every setting as `section.key` and its value, as JSON would give it back."""
    return {
        f"{section}.{leaf}": list(value) if isinstance(value, tuple) else value
        for section, settings in dataclasses.asdict(config).items()
        for leaf, value in settings.items()
    }


SECTIONS: dict[str, type[Any]] = get_type_hints(Config)
KEYS: dict[str, Field] = {
    name: field
    for section, owner in SECTIONS.items()
    for name, field in fields_of(owner, f"{section}.").items()
}
