"""The table of keys, read off the dataclasses of `configs/schema.py`."""

import dataclasses
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.schema import Config

# A list is a tuple, of whole numbers or of instances of a dataclass.
Value = int | float | str | bool | tuple[Any, ...] | None

_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting, such as `optimizer.lr`."""

    name: str
    type: type[Any]  # int, float, str, bool, or the dataclass of a mapping; of a list, its items'
    choices: tuple[str, ...]  # of a Literal; else empty
    nullable: bool
    default: Any  # dataclasses.MISSING: it must be given
    count: int | None = None  # items of a list, 0: any number of them; None: it is one value

    @property
    def allowed(self) -> str:
        """What may be written for it, in words."""
        if self.choices:
            text = ", ".join(self.choices)
        elif dataclasses.is_dataclass(self.type):
            text = f"a mapping {{{', '.join(self.fields)}}}"
        else:
            text = _WORDS[self.type]
        if self.count is not None:
            text = f"a list [{', '.join([text] * self.count) if self.count else f'{text}, ...'}]"
        return f"{text} or null" if self.nullable else text

    @property
    def fields(self) -> dict[str, "Key"]:
        """The keys inside a mapping, by their last part."""
        return keys_of(self.type, f"{self.name}.")

    def item(self, number: int) -> "Key":
        """The key of one item of a list."""
        name = f"{self.name}[{number}]"
        return dataclasses.replace(self, name=name, nullable=False, default=None, count=None)


def _key(name: str, hint: Any, default: Any) -> Key:
    nullable = get_origin(hint) is not Literal and NoneType in get_args(hint)
    kind = get_args(hint)[0] if nullable else hint
    if get_origin(kind) is Literal:
        return Key(name, str, get_args(kind), nullable, default)
    if get_origin(kind) is tuple:
        items = get_args(kind)
        count = 0 if Ellipsis in items else len(items)
        return Key(name, items[0], (), nullable, default, count)
    return Key(name, kind, (), nullable, default)


def keys_of(dataclass: type[Any], prefix: str = "") -> dict[str, Key]:
    """The keys of the fields of a dataclass, by the field's name; each after `prefix`."""
    hints = get_type_hints(dataclass)
    return {
        field.name: _key(f"{prefix}{field.name}", hints[field.name], field.default)
        for field in dataclasses.fields(dataclass)
    }


def flatten(config: Config) -> dict[str, Any]:
    """Returns every setting as `section.key` and its value, as JSON would give it back."""
    return {
        f"{section}.{leaf}": list(value) if isinstance(value, tuple) else value
        for section, settings in dataclasses.asdict(config).items()
        for leaf, value in settings.items()
    }


SECTIONS: dict[str, type] = get_type_hints(Config)
KEYS: dict[str, Key] = {
    key.name: key
    for section, dataclass in SECTIONS.items()
    for key in keys_of(dataclass, f"{section}.").values()
}
