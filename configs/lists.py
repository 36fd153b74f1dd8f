"""Settings that are lists: of numbers, or of mappings with keys of their own.

They are written as in YAML, in a file or on the command line: `logging.profile_steps=[10, 12]`,
`data.sources=[{source: text, path: a.txt}, {path: b, weight: 2}]`.
"""

import dataclasses
import difflib
from typing import Any

import yaml

from configs.errors import shown
from configs.keys import Key, Value
from configs.values import NULLS, Written, parse_value
from configs.yaml_file import PLAIN_TAGS, described, mapping_items


def parse_setting(key: Key, written: Written) -> Value:
    """Reads what was written for a key, one value or a list; ConfigError says what is allowed."""
    if key.count is None:
        return parse_value(key, written)
    node = written.node
    is_null = isinstance(node, yaml.ScalarNode) and not node.style and node.value in NULLS
    if is_null and key.nullable:
        return None
    if not isinstance(node, yaml.SequenceNode):
        text = shown(written.text) if node is None else described(node)
        raise written.error(f"{key.name}={text} is no list; write {key.allowed}")
    if key.count and len(node.value) != key.count:
        raise written.error(f"{key.name} has {len(node.value)} items; write {key.allowed}")
    return tuple(_item(key.item(number), item, written) for number, item in enumerate(node.value))


def _item(key: Key, node: yaml.Node, written: Written) -> Any:
    """One item of a list, of the type that the key has."""
    if not dataclasses.is_dataclass(key.type):
        return _scalar(key, node, written)
    if not isinstance(node, yaml.MappingNode):
        raise written.error(f"{key.name}={described(node)} is not {key.allowed}")
    fields, values = key.fields, {}
    for name, value in mapping_items(node, f"{key.name}.", written.file):
        leaf = name.removeprefix(f"{key.name}.")
        if leaf not in fields:
            nearest = difflib.get_close_matches(leaf, fields, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(fields)}"
            raise written.error(f"{key.name} has no key {shown(leaf)}; {hint}")
        values[leaf] = _scalar(fields[leaf], value, written)
    return key.type(**values)


def _scalar(key: Key, node: yaml.Node, written: Written) -> Value:
    if not isinstance(node, yaml.ScalarNode) or node.tag not in PLAIN_TAGS:
        raise written.error(f"{key.name}={described(node)} is not {key.allowed}")
    place = f"{written.file}:{node.start_mark.line + 1}" if written.place else ""
    return parse_value(key, Written(key.name, node.value, node.style is not None, place))
