"""Odd and damaged files and records: kept, skipped with a reason, or named in an error."""

import bz2
import gzip
import itertools
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.schema import DataConfig, WeightedSource
from data.corpus import sources as sources_module
from data.corpus.sources import cut_text, read_records
from data.corpus.spool import START, ReadCursor
from data.source_files import DATA_KEYS
from tests.data_corpora import prepare_corpus, random_text

# The content of a text file, and the reason to skip it (None: it is a document).
TEXTS: dict[str, tuple[bytes, str | None]] = {
    "plain": (b"plain text\n", None),
    "no_newline_at_the_end": (b"text", None),
    "windows": (b"one\r\ntwo\r\n", None),
    "mac": (b"one\rtwo\r", None),
    "byte_order_mark": (b"\xef\xbb\xbftext", None),
    "only_spaces": (b"   \n \t\n", None),
    "nul": (b"a\x00b\x00", None),
    "controls": (bytes(range(1, 32)), None),
    "separators": ("a\u2028b\u2029c\u0085d".encode(), None),
    "emoji": ("\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea".encode(), None),
    "combining": (("e" + "\u0301" * 200).encode(), None),
    "right_to_left": ("\u05e9\u05dc\u05d5\u05dd \u202e abc".encode(), None),
    "private": ("\ue000\uf8ff\U0010ffff".encode(), None),
    "block": ("\u2581x\u2581\u2581".encode(), None),
    "one_long_line": (b"x" * 200_000, None),
    "many_newlines": (b"\n" * 50_000, None),
    "looks_special": (b"<s> </s> <unk> <0x41>", None),
    "empty": (b"", "empty"),
    "same_as_plain": (b"plain text\n", "duplicate"),
    "latin_1": (b"caf\xe9", "not UTF-8"),
    "utf_16": ("text".encode("utf-16"), "not UTF-8"),
    "cut_inside_a_character": ("caf\u00e9".encode()[:-1], "not UTF-8"),
    "overlong": (b"\xc0\xaf", "not UTF-8"),
    "surrogate": (b"\xed\xa0\x80", "not UTF-8"),
    "beyond_unicode": (b"\xf5\x80\x80\x80", "not UTF-8"),
    "binary": (bytes(range(256)) * 4, "not UTF-8"),
    "gzip_by_another_name": (gzip.compress(b"text"), "not UTF-8"),
}
# A line of JSON, and the reason to skip it.
LINES: list[tuple[bytes, str | None]] = [
    (b'{"text": "first"}', None),
    (b'  {"text": "spaces around"}  ', None),
    (b'{"text": "two", "text": "the last counts"}', None),
    (b'{"text": "a\\u0000b"}', None),
    (b'{"text": "\\ud83d\\ude00"}', None),
    (b'{"text": "2020-01-01"}', None),
    (b'{"text": "other types beside", "n": [1, {"a": null}], "x": NaN}', None),
    (b'{"text": null}', "null"),
    (b'{"other": 1}', "null"),
    (b'{"text": 5}', "not a string"),
    (b'{"text": true}', "not a string"),
    (b'{"text": ["a"]}', "not a string"),
    (b'{"text": {"a": "b"}}', "not a string"),
    (b'{"text": ""}', "empty"),
    (b'{"text": "half \\ud800"}', "not UTF-8"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "first"}', "duplicate"),
]
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def expected_skips(cases: list[tuple[bytes, str | None]]) -> dict[str, int]:
    """Count the reasons."""
    reasons = [reason for _, reason in cases if reason is not None]
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def test_every_odd_text_and_record_is_counted(tmp_path: Path) -> None:
    """In a mixture of text files, JSON lines and a table; documents round-trip exactly."""
    for name, (content, _) in TEXTS.items():
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_bytes(content)
    (tmp_path / "texts" / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "texts" / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "texts" / "pipe.txt")
    (tmp_path / "texts" / "good.txt").write_text(random_text(1, 400))
    lines = b"\n\n".join(line for line, _ in LINES) + b"\n   \n"
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines))
    table = pyarrow.table({"text": ["cell", None, "", "a\x00"], "more": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    config = DataConfig(
        sources=(
            WeightedSource("text", str(tmp_path / "texts")),
            WeightedSource("jsonl", str(tmp_path / "lines.jsonl.gz")),
            WeightedSource("parquet", str(tmp_path / "table.parquet")),
        ),
        sequence_mode="pad",
        vocab_size=400,
        validation_fraction=0.2,
        cache_directory=str(tmp_path / "cache"),
    )
    corpus = prepare_corpus(config, 16, 0)
    texts, rows, cells = corpus.summary["sources"].values()
    assert texts["skipped"] == expected_skips(list(TEXTS.values()))
    assert texts["records"] == len(TEXTS) + 1
    assert rows["skipped"] == expected_skips(LINES)
    assert rows["records"] == len(LINES)
    assert cells["skipped"] == {"empty": 1, "null": 1}
    kept = {content for content, reason in TEXTS.values() if reason is None}
    kept |= {json.loads(line)["text"].encode() for line, reason in LINES if reason is None}
    kept |= {b"cell", b"a\x00", (tmp_path / "texts" / "good.txt").read_bytes()}
    found = set()
    for split in (corpus.train, corpus.validation):
        offsets = split.document_offsets.tolist()
        for start, end in itertools.pairwise(offsets):
            ids = split.span(start, end).tolist()
            found.add(corpus.tokenizer.decode(ids[1:-1]).encode())
    assert found == kept


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_and_truncated_ones_are_errors(
    tmp_path: Path, ending: str
) -> None:
    """A file of two parts is read to its end; a truncated one gives no documents."""
    text = "".join(f"line {number} é\n" for number in range(5000))
    codec = PACKERS.get(ending) or pyarrow.Codec("zstd").compress
    packed = bytes(memoryview(codec(text.encode())))
    (tmp_path / f"a.txt{ending}").write_bytes(packed + packed)
    config = DataConfig(source="text", path=str(tmp_path))
    files = [tmp_path / f"a.txt{ending}"]
    (record,) = read_records(config, DATA_KEYS, files, tmp_path / "s")
    assert record.texts == [text + text]
    for content in (packed[: len(packed) // 2], packed[:-1], b"junk" * 9):
        files[0].write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^data\.path: .*a\.txt{ending} cannot be read as text: "
        ):
            list(read_records(config, DATA_KEYS, files, tmp_path / "s"))


def test_a_truncated_table_is_named(tmp_path: Path) -> None:
    """A parquet file has its schema at the end."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 1000] * 50}), path)
    path.write_bytes(path.read_bytes()[:-20])
    config = DataConfig(source="parquet", path=str(path))
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as parquet"):
        list(read_records(config, DATA_KEYS, [path], tmp_path / "s"))


@pytest.mark.parametrize("text", ["ab\ncd\n" * 7, "é" * 40, "a" * 30 + "\n" + "b" * 3, ""])
def test_a_gigantic_text_becomes_several_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """They concatenate to the text; each is short enough and ends with a line if there is one."""
    monkeypatch.setattr(sources_module, "MAX_DOCUMENT_SIZE", 8)
    pieces = cut_text(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= 8 for piece in pieces)
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(sources_module, "MAX_DOCUMENT_SIZE", 9)
    config = DataConfig(source="text", path=str(tmp_path))
    records = list(read_records(config, DATA_KEYS, [tmp_path / "a.txt"], tmp_path / "s"))
    assert "".join(piece for record in records for piece in record.texts) == text
    assert all(len(piece.encode()) <= 9 for record in records for piece in record.texts)
    if text.count("\n") > 1:
        assert all(record.texts[0].endswith("\n") for record in records)


def test_a_gigantic_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted, and the next line is read."""
    longest = 1 << 20
    monkeypatch.setattr(sources_module, "MAX_JSON_SIZE", longest)
    path, frame = tmp_path / "a.jsonl", len('{"text": ""}')
    config = DataConfig(source="jsonl", path=str(path))
    for size in (longest - 1, longest, longest + 1, 3 * longest):  # without the newline
        text = "x" * (size - frame)
        path.write_text(f'{{"text": "{text}"}}\n{{"text": "after"}}\n')
        records = list(read_records(config, DATA_KEYS, [path], tmp_path / "s"))
        first = ([text], None) if size < longest else ([], "longer than 1 MiB")
        assert [(record.texts, record.reason) for record in records] == [first, (["after"], None)]


@pytest.mark.parametrize("read_bytes", [1, 2, 7, 1 << 20])
def test_an_array_of_objects_is_read_like_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """Item by item, with any block size; odd values are unchanged."""
    monkeypatch.setattr(sources_module, "_READ_SIZE", read_bytes)
    config = DataConfig(source="jsonl", path=str(tmp_path))
    path, by_line = tmp_path / "a.json", tmp_path / "b.jsonl"
    lines = [line for line, _ in LINES]
    path.write_bytes(b"\xef\xbb\xbf\n [" + b" ,\n".join(lines) + b"\n]\n \n")
    by_line.write_bytes(b"\n".join(lines))

    def read(file: Path) -> list[Any]:
        records = read_records(config, DATA_KEYS, [file], tmp_path / "s")
        return [(record.texts, record.reason) for record in records]

    assert read(path) == read(by_line)
    path.write_bytes(b"[]")
    assert read(path) == []
    for content, message in (
        (b'[{"text": "a"}, 5]', "item 2 of .* is not a JSON object"),
        (b'[{"text": "a"} {"text": "b"}]', "an item is followed by '{', not by , or ]"),
        (b'[{"text": "a"}, {"text": ', "cannot be read as json"),
        (b'[{"text": "a"}', "cannot be read as json"),
        (b'[{"text": "a"}] x', "text after the end of the array"),
        (b"[" * 100_000, "cannot be read as json"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^data\.path: .*{message}"):
            read(path)


def test_numbers_next_to_a_text_may_have_any_length(tmp_path: Path) -> None:
    """Python limits the digits of an integer; we do not."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "1" * 5000 + "}\n")
    config = DataConfig(source="jsonl", path=str(tmp_path))
    (record,) = read_records(config, DATA_KEYS, [tmp_path / "a.jsonl"], tmp_path / "s")
    assert record.texts == ["a"]


def rows_of(path: Path, source: Any) -> list[Any]:
    """Write records of one kind of source, some of them not text; return the files."""
    values = ["one", None, "two", "", "three", "four"]
    if source == "text":
        for number, value in enumerate(values):
            (path / f"{number}.txt").write_text(value or "")
    elif source == "jsonl":
        rows = "".join(json.dumps({"text": value}) + "\n\n" for value in values)
        (path / "a.jsonl").write_text(rows)
        (path / "b.json").write_text(json.dumps([{"text": "five"}, {"text": "six"}]))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"text": ["five", None]}), path / "b.parquet")
    return sorted(path.iterdir())


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_reading_resumes_after_any_record(tmp_path: Path, source: Any) -> None:
    """From the cursor of a record, the remaining records follow."""
    (tmp_path / "in").mkdir()
    files = rows_of(tmp_path / "in", source)
    config = DataConfig(source=source, path=str(tmp_path / "in"))

    def read(start: ReadCursor) -> list[Any]:
        return list(read_records(config, DATA_KEYS, files, tmp_path / "s", start))

    records = read(START)
    assert len(records) == (6 if source == "text" else 8)
    for number, record in enumerate(records, start=1):
        assert read(record.next) == records[number:]
