"""Multiple-choice files: JSON lines with a context, its choices and the answer. No torch here."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import bad_setting, os_error_text
from configs.tokenizer_files import expand_path

_EXAMPLE = '{"context": "1 + 1 =", "choices": ["2", "3"], "answer": 0}'


@dataclass(frozen=True)
class Item:
    """One question: which choice continues the context?"""

    line: int  # in its file, from 1
    context: str  # may be empty
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    delimiter: str  # between context and choice


def read_tasks(key: str, paths: Iterable[str]) -> dict[str, list[Item]]:
    """Return the items of each file by its name without extension; `key` names it in errors."""
    tasks: dict[str, list[Item]] = {}
    for path in paths:
        name = Path(path).stem
        if name in tasks:
            problem = f"has the same name as another file, and metrics are called eval/{name}/..."
            raise bad_setting(key, path, f"{problem}; rename one of them")
        tasks[name] = _read_task(key, path)
    return tasks


def _read_task(key: str, path: str) -> list[Item]:
    try:
        lines = Path(expand_path(key, path)).read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise bad_setting(
            key, path, f"cannot be read: {os_error_text(error)}; give a JSON lines file"
        ) from error
    except UnicodeDecodeError as error:
        raise bad_setting(key, path, f"is not UTF-8 text (byte {error.start})") from error
    items = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                items.append(_parse(number, line))
            except (ValueError, RecursionError) as error:
                problem = f"has an invalid item in line {number}: {error}"
                raise bad_setting(key, path, f"{problem}; write {_EXAMPLE}") from error
    if not items:
        raise bad_setting(key, path, f"has no items; write one per line, such as {_EXAMPLE}")
    return items


def _parse(number: int, line: str) -> Item:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    context, choices, answer = (record.get(name) for name in ("context", "choices", "answer"))
    delimiter = record.get("delimiter", " ")
    if not isinstance(context, str) or not isinstance(delimiter, str):
        raise ValueError("context and delimiter (optional) must be strings")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices must be a list of non-empty strings")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be the index of a choice, 0 to {len(choices) - 1}")
    "".join((context, delimiter, *choices)).encode()  # JSON can escape what UTF-8 cannot contain
    return Item(number, context, tuple(choices), answer, delimiter)
