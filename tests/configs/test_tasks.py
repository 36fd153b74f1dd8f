"""Multiple-choice files: what an item is, and one line for each mistake in them."""

from pathlib import Path

import pytest

from configs import ConfigError, parse_config
from configs.tasks import Item, read_tasks

GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 1}'


def test_items_are_read_with_their_line(tmp_path: Path) -> None:
    """Blank lines and further fields are ignored, and the delimiter is a space by default."""
    path = tmp_path / "two.jsonl"
    other = '{"context": "", "choices": ["\u2028"], "answer": 0, "delimiter": "", "id": 3}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n\n{other}\n".encode())
    expected = [Item(1, "a", ("b", "c"), 1, " "), Item(3, "", ("\u2028",), 0, "")]
    assert read_tasks("task", [str(path)]) == {"two": expected}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'a': 1}", "Expecting property name"),
        ("[1]", "it is not a JSON object"),
        (GOOD.replace('"a"', "3"), "context and delimiter (optional) must be strings"),
        (GOOD.replace('"b"', '""'), "choices must be a list of non-empty strings"),
        (GOOD.replace('["b", "c"]', '"bc"'), "choices must be a list of non-empty strings"),
        (GOOD.replace(": 1", ": 2"), "answer must be the index of a choice, 0 to 1"),
        (GOOD.replace(": 1", ": true"), "answer must be the index of a choice, 0 to 1"),
        (GOOD.replace('"a"', '"\\ud800"'), "surrogates not allowed"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_item_is_named_by_its_line(tmp_path: Path, line: str, problem: str) -> None:
    """With what is wrong and an example."""
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ConfigError) as raised:
        read_tasks("task", [str(path)])
    message = str(raised.value)
    assert " has an invalid item in line 2: " in message
    assert problem in message
    assert "\n" not in message


def test_a_bad_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """By the configuration, like every other input; one file may be given without brackets."""
    (tmp_path / "other").mkdir()
    for name in ("empty.jsonl", "a.jsonl", "other/a.jsonl"):
        (tmp_path / name).write_text(GOOD if "a." in name else "\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    for given, problem in (
        ("missing.jsonl", "cannot be read: No such file"),
        ("other", "cannot be read: Is a directory"),
        ("latin.jsonl", "is not UTF-8 text (byte 0)"),
        ("empty.jsonl", "has no items; write one per line"),
        (f"other/a.jsonl, {tmp_path}/a.jsonl", "has the same name as another file"),
    ):
        tasks = f"[{tmp_path}/{given}]" if "," in given else f"{tmp_path}/{given}"
        with pytest.raises(ConfigError, match=r"evaluate\.tasks=") as raised:
            parse_config(["config=gpt_debug", f"evaluate.tasks={tasks}"])
        assert problem in str(raised.value)
    found = parse_config(["config=gpt_debug", f"evaluate.tasks={tmp_path}/a.jsonl"])
    assert found.evaluate.tasks == (f"{tmp_path}/a.jsonl",)
