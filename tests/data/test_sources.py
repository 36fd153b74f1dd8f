"""Every kind of source: documents, skipped records, and errors."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs import UserError
from configs.schema import DataConfig
from data.corpus.sources import read_records
from data.source_files import DATA_KEYS, source_files, source_fingerprint
from tests.data_corpora import prepare_corpus, random_text, text_config


def read(config: DataConfig, scratch: Path) -> tuple[list[str], dict[str, int]]:
    """Return the documents of a source, and the number of skipped records by reason."""
    files = source_files(config)
    records = list(read_records(config, DATA_KEYS, files, scratch / "scratch"))
    skipped = Counter(record.reason for record in records if record.reason is not None)
    return [text for record in records for text in record.texts], dict(skipped)


def write_lines(path: Path, rows: list[Any]) -> None:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_text_files_are_documents_byte_for_byte(tmp_path: Path) -> None:
    """Line ends, NUL and order are kept; empty and undecodable files are counted."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"one\r\ntwo\rthree\x00\n\n")
    (tmp_path / "b.txt").write_bytes("\ufeff\u00e9\U0001f600".encode())
    (tmp_path / "a[1]*.txt").write_bytes(b"odd name")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "other.md").write_bytes(b"not a .txt file")
    documents, skipped = read(DataConfig(source="text", path=str(tmp_path)), tmp_path)
    assert documents == ["odd name", "\ufeff\u00e9\U0001f600", "one\r\ntwo\rthree\x00\n\n"]
    assert skipped == {"empty": 1, "not UTF-8": 1}


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: Path) -> None:
    """The three forms find the same documents, in order of their names."""
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    folder = read(DataConfig(source="text", path=str(tmp_path)), tmp_path)
    pattern = read(DataConfig(source="text", path=str(tmp_path / "*.txt")), tmp_path)
    single = read(DataConfig(source="text", path=str(tmp_path / "b.txt")), tmp_path)
    assert folder == pattern == (["a.txt", "b.txt", "c.txt"], {})
    assert single == (["b.txt"], {})


def test_json_lines(tmp_path: Path) -> None:
    """Only non-empty strings are documents; strings that look like dates stay text."""
    rows: list[Any] = [
        {"text": "a\r\nb\u2028c", "meta": None},
        {"text": "2020-01-01T00:00:00", "meta": {"k": [1]}},
        {"text": None},
        {"text": 5, "meta": "x"},
        {"text": ["list"]},
        {"text": ""},
        {"other": 1},
        {"text": "half \ud800 pair"},
        {"text": "\u00e9\U0001f600\x00"},
    ]
    write_lines(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'\n   \n{"text": "\xff"}\r\n{"text": "last"}')
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.json").write_text(json.dumps([{"text": "in an array"}, {"text": None}]))
    documents, skipped = read(DataConfig(source="jsonl", path=str(tmp_path)), tmp_path)
    assert documents == [
        "a\r\nb\u2028c",
        "2020-01-01T00:00:00",
        "\u00e9\U0001f600\x00",
        "last",
        "in an array",
    ]
    assert skipped == {"null": 3, "not a string": 2, "empty": 1, "not UTF-8": 2}


def test_json_columns_may_change_type_far_into_the_file(tmp_path: Path) -> None:
    """Other columns do not matter, even beyond the first block."""
    long_text = "x" * 5000
    rows: list[Any] = [{"text": long_text, "meta": None}] * 2500
    write_lines(tmp_path / "a.jsonl", [*rows, {"text": "last", "meta": {"k": 1}}])
    documents, skipped = read(DataConfig(source="jsonl", path=str(tmp_path)), tmp_path)
    assert (len(documents), documents[-1], skipped) == (2501, "last", {})


@pytest.mark.parametrize("source", ["parquet", "arrow"])
def test_columnar_files(tmp_path: Path, source: Any) -> None:
    """Strings and large strings are read; null, empty and other types are skipped."""
    strings = pyarrow.table({"body": ["a", None, "", "b\n"], "id": [1, 2, 3, 4]})
    large = pyarrow.table({"body": pyarrow.array(["c"], pyarrow.large_string())})
    numbers = pyarrow.table({"body": [7, 8], "more": ["x", "y"]})
    for name, table in (("1", strings), ("2", large), ("3", numbers)):
        path = tmp_path / f"{name}.{source}"
        if source == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
    config = DataConfig(source=source, path=str(tmp_path), text_field="body")
    documents, skipped = read(config, tmp_path)
    assert documents == ["a", "b\n", "c"]
    assert skipped == {"null": 1, "empty": 1, "not a string": 2}


def test_hub_datasets_are_opened_by_name(tmp_path: Path) -> None:
    """`datasets` also accepts a local folder, which needs no network."""
    (tmp_path / "repo").mkdir()
    write_lines(tmp_path / "repo" / "train.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    config = DataConfig(source="hub", path=str(tmp_path / "repo"))
    assert read(config, tmp_path) == (["a", "b"], {"empty": 1})


def test_a_missing_hub_dataset_names_the_keys(tmp_path: Path) -> None:
    """The message has the values and a way out."""
    (tmp_path / "repo").mkdir()
    write_lines(tmp_path / "repo" / "train.jsonl", [{"text": "a"}])
    config = DataConfig(source="hub", path=str(tmp_path / "repo"), hub_split="nosplit")
    with pytest.raises(ValueError, match=r"data\.hub_split=nosplit.*local data\.source"):
        read(config, tmp_path)


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_a_missing_column_names_the_others(tmp_path: Path, source: Any) -> None:
    """The error has key, value and the existing columns."""
    write_lines(tmp_path / "a.jsonl", [{"content": "x", "id": 1}])
    table = pyarrow.table({"content": ["x"], "id": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data\.text_field='text'.*columns are: content, id"):
        read(DataConfig(source=source, path=str(tmp_path)), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'"only a string"\n', r"line 1 of .*a\.jsonl is not a JSON object"),
        ("a.json", b'[{"text": ', r"a\.json cannot be read as json"),
        ("a.parquet", b"junk", r"a\.parquet cannot be read as parquet"),
        ("a.arrow", b"junk", r"a\.arrow cannot be read as arrow"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """The message has the key, the file and the number of a line."""
    (tmp_path / name).write_bytes(content)
    source: Any = {"a.json": "jsonl"}.get(name, name.removeprefix("a."))
    with pytest.raises(ValueError, match=r"data\.path.*" + message):
        read(DataConfig(source=source, path=str(tmp_path)), tmp_path)


def test_a_path_without_files_names_what_is_needed(tmp_path: Path) -> None:
    """No path, and a path without matching files."""
    with pytest.raises(ValueError, match=r"data\.path is null; data\.source=parquet needs"):
        source_files(DataConfig(source="parquet"))
    with pytest.raises(ValueError, match=r"data\.path is null; data\.source=hub needs"):
        source_files(DataConfig(source="hub"))
    with pytest.raises(
        UserError, match=r"matches no files.*\.jsonl or \.json \(or compressed\) files"
    ):
        source_files(DataConfig(source="jsonl", path=str(tmp_path)))


def test_the_standard_library_is_found_without_installed_packages() -> None:
    """Only its own modules, nothing that pip installed."""
    files = source_files(DataConfig())
    names = {file.name for file in files}
    assert {"argparse.py", "dataclasses.py", "this.py"} <= names
    assert not any({"site-packages", "dist-packages"} & set(file.parts) for file in files)
    assert len(files) > 500


def test_the_fingerprint_depends_on_the_content(tmp_path: Path) -> None:
    """Not on the folder; one changed byte or another order changes it."""

    def fingerprint(folder: str, **changes: Any) -> str:
        config = DataConfig(**{"source": "text", "path": str(tmp_path / folder), **changes})
        return source_fingerprint(config, source_files(config), tmp_path / "cache")

    for folder, texts in (("x", "ab"), ("moved", "ab"), ("changed", "ac"), ("swapped", "ba")):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(text)
    assert fingerprint("x") == fingerprint("moved")
    assert len({fingerprint(folder) for folder in ("x", "changed", "swapped")}) == 3
    before = fingerprint("x", path=str(tmp_path / "x" / "0*"))
    (tmp_path / "x" / "0.txt").rename(tmp_path / "x" / "0.txt.gz")  # decides how it is read
    assert fingerprint("x", path=str(tmp_path / "x" / "0*")) != before
    hub = [fingerprint("x", source="hub", hub_revision=revision) for revision in (None, "v2")]
    assert hub[0] != hub[1]


def test_changed_text_in_a_local_folder_of_a_hub_dataset_is_noticed(tmp_path: Path) -> None:
    """Names count too, because `datasets` may take splits from them; the place does not."""

    def fingerprint(folder: Path) -> str:
        config = DataConfig(source="hub", path=str(folder))
        return source_fingerprint(config, source_files(config), tmp_path / "cache")

    folder, moved = tmp_path / "x", tmp_path / "moved"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("")
    write_lines(folder / "data" / "train.jsonl", [{"text": "old"}])
    found = [fingerprint(folder)]
    write_lines(folder / "data" / "train.jsonl", [{"text": "new"}])
    found.append(fingerprint(folder))
    folder.rename(moved)
    assert fingerprint(moved) == found[-1]
    (moved / "data" / "train.jsonl").rename(moved / "data" / "test.jsonl")
    found.append(fingerprint(moved))
    assert len(set(found)) == 3


def test_every_start_logs_the_commit_of_a_hub_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is pinned in the cache: a newer one is read only into a new cache."""
    (tmp_path / "repo").mkdir()
    write_lines(tmp_path / "repo" / "train.jsonl", [{"text": random_text(i, 20)} for i in range(9)])
    commits = iter(("abc", "def"))
    monkeypatch.setattr("data.corpus.hub.commit_of", lambda *_: next(commits))
    config = text_config(tmp_path, source="hub", path=str(tmp_path / "repo"))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            prepare_corpus(config, 16, 0)
        assert f"data.path={config.path}: commit abc of the hub" in caplog.text
