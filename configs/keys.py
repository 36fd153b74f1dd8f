"""The table of keys, read off the dataclasses of `configs/schema.py`."""

import dataclasses
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.schema import Config

Value = int | float | str | bool | None


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting, such as `optimizer.lr`."""

    name: str
    type: type[int] | type[float] | type[str] | type[bool]
    choices: tuple[str, ...]  # of a Literal; else empty
    nullable: bool
    default: Value

    @property
    def allowed(self) -> str:
        """What may be written for it, in words."""
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        text = ", ".join(self.choices) if self.choices else words[self.type]
        return f"{text} or null" if self.nullable else text


def _key(name: str, hint: Any, default: Any) -> Key:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) is Literal:
        return Key(name, str, tuple(kinds), nullable=False, default=default)
    nullable = NoneType in get_args(hint)
    return Key(name, kinds[0] if nullable else hint, (), nullable, default)


def _all_keys() -> dict[str, Key]:
    keys = {}
    for section, section_class in get_type_hints(Config).items():
        hints = get_type_hints(section_class)
        for field in dataclasses.fields(section_class):
            name = f"{section}.{field.name}"
            keys[name] = _key(name, hints[field.name], field.default)
    return keys


def flatten(config: Config) -> dict[str, Value]:
    """Returns every setting as `section.key` and its value."""
    return {
        f"{section}.{leaf}": value
        for section, settings in vars(config).items()
        for leaf, value in vars(settings).items()
    }


SECTIONS: dict[str, type] = get_type_hints(Config)
KEYS: dict[str, Key] = _all_keys()
