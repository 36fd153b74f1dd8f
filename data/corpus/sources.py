"""Read the documents of a source, record by record.

A document is one non-empty string: a text file, the text column of a row, or the segments of a
prompt-completion pair or a conversation (data/corpus/segments.py). Everything else is skipped with
a reason; docs/data.md has the policy. Reading is a stream: about one document is in memory,
`datasets` stores no copy of the corpus, and each record says where reading resumes.

Text and JSON lines are decoded here. The builders of `datasets` would stop at the first byte that
is not UTF-8; `text` would also translate line ends, and `json` would parse dates and refuse files
whose other columns change type.
"""

import bz2
import contextlib
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from configs.errors import UserError
from configs.schema import SourceConfig
from data.corpus.segments import conversation_segments, pair_segments, to_document
from data.corpus.spool import START, ReadCursor, Record
from data.source_files import SourceKeys

# Bytes of a text file, characters elsewhere. Longer texts are cut into several documents, each
# much longer than any row.
MAX_DOCUMENT_SIZE = 16 << 20
MAX_JSON_SIZE = 256 << 20  # bytes of a line, characters of an item; parsed in memory
_READ_SIZE = 1 << 20
_START_BYTES = 1024  # of a JSON file, in which the first character must be
_CONTINUES = 0b10  # the upper bits of a byte that is not the first of its character
_NOT_UTF8 = "not UTF-8"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"[ \t\r\n]*")
# Python refuses integers beyond 4,300 digits; numbers are never text, so they need not be exact.
_PARSER = json.JSONDecoder(parse_int=float)
_MAX_NAMED = 10  # files that the log names because they are not UTF-8
# Truncated files raise EOFError, pyarrow ValueError, OSError or TypeError, nested JSON
# RecursionError.
_READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    RecursionError,
    lzma.LZMAError,
    zlib.error,
)

logger = logging.getLogger("microtron")


class Skip(NamedTuple):
    """Stands for a record that has no documents."""

    reason: str


def read_records(
    source: SourceConfig,
    keys: SourceKeys,
    files: list[Path],
    scratch: Path,
    start: ReadCursor = START,
) -> Iterator[Record]:
    """Yield the records of a source in order, from a cursor on.

    `scratch` is a folder for the lock files of `datasets`. Raises UserError, naming the key and the
    file, if the source cannot be read or lacks a column.
    """
    undecodable: dict[str, None] = {}
    for number in range(start.file, len(files) if source.source != "hub" else 1):
        file = files[number] if files else None
        skipped = start.record if number == start.file else 0
        with _errors_naming_source(source, keys, file):
            values = itertools.islice(_values(source, keys, file, scratch), skipped, None)
            for record, value in enumerate(values, start=skipped + 1):
                texts, reason = _documents(source, value)
                if file is not None and reason == _NOT_UTF8 and len(undecodable) < _MAX_NAMED:
                    undecodable[file.name] = None
                yield Record(texts, reason, ReadCursor(number, record))
    if undecodable:
        more = ", ..." if len(undecodable) == _MAX_NAMED else ""
        logger.info("skipped text that is not UTF-8 in: %s%s", ", ".join(undecodable), more)


@contextlib.contextmanager
def _errors_naming_source(
    source: SourceConfig, keys: SourceKeys, file: Path | None
) -> Iterator[None]:
    """Turn errors of reading into UserErrors that name the key and the file or dataset."""
    where = f"{keys.path}: {file} cannot be read as {source.source}"
    kinds: tuple[type[Exception], ...] = _READ_ERRORS
    if file is None:
        prefix, kinds = keys.prefix, (Exception,)  # network libraries have their own errors
        where = (
            f"{keys.path}={source.path!r} ({prefix}hub_config={source.hub_config}, "
            f"{prefix}hub_split={source.hub_split}, {prefix}hub_revision={source.hub_revision})"
            f" cannot be read; check these keys and the network, or use a local {prefix}source"
        )
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{where}: {error}") from error


def _documents(source: SourceConfig, value: Any) -> tuple[list[str], str | None]:
    """Return the documents of a record, or why there are none."""
    if isinstance(value, Skip):
        return [], value.reason
    return _text(value) if source.format == "text" else _segments(source, value)


def _text(value: object) -> tuple[list[str], str | None]:
    """Return the documents of a value that should be a string, or none and the reason."""
    if value is None:
        return [], "null"
    if not isinstance(value, str):
        return [], "not a string"
    if not value:
        return [], "empty"
    # JSON can contain half of a surrogate pair, which has no UTF-8 form.
    if _SURROGATE.search(value):
        return [], _NOT_UTF8
    return cut_text(value), None


def _segments(source: SourceConfig, columns: list[Any]) -> tuple[list[str], str | None]:
    """Return the document of a pair or a conversation, or none and the reason."""
    if source.format == "messages":
        segments, reason = conversation_segments(*columns)
    else:
        segments, reason = pair_segments(*columns)
    document = to_document(segments)
    if len(document) > MAX_DOCUMENT_SIZE:
        reason = f"longer than {MAX_DOCUMENT_SIZE >> 20} MiB"
    elif _SURROGATE.search(document):
        reason = _NOT_UTF8
    return ([document], None) if reason is None else ([], reason)


def cut_text(text: str) -> list[str]:
    """Cut a text into documents of at most `MAX_DOCUMENT_SIZE` characters, if possible at lines."""
    pieces, start = [], 0
    while len(text) - start > MAX_DOCUMENT_SIZE:
        newline = text.rfind("\n", start, start + MAX_DOCUMENT_SIZE)
        end = start + MAX_DOCUMENT_SIZE if newline < 0 else newline + 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _values(
    source: SourceConfig, keys: SourceKeys, file: Path | None, scratch: Path
) -> Iterator[Any]:
    """Yield what should be the text of each record, or its columns in another format."""
    if file is not None and source.source in ("python_stdlib", "text"):
        return _text_pieces(file)
    if file is not None and file.stat().st_size == 0:  # no rows
        return iter(())
    if file is None or source.source != "jsonl":
        return _columns(source, keys, _table_rows(source, file, scratch))
    with open_bytes(file) as stream:
        start = stream.read(_START_BYTES).removeprefix(b"\xef\xbb\xbf")
    read = _json_array if start.lstrip().startswith(b"[") else _json_lines
    return _columns(source, keys, read(file, keys))


def open_bytes(file: Path) -> IO[bytes]:
    """Open a file for reading; its suffix decides whether it is compressed."""
    if file.suffix == ".zst":
        # It comes with `datasets`, and importing it takes time.
        import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415

        stream = pyarrow.input_stream(str(file), compression="zstd")
        return cast(IO[bytes], io.BufferedReader(stream))
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix, open)
    return cast(IO[bytes], opener(file, "rb"))


def _text_pieces(file: Path) -> Iterator[str | Skip]:
    """Yield the text of a file, whole or in pieces of at most `MAX_DOCUMENT_SIZE` bytes.

    A piece ends with a newline, or with a whole character if there is no newline.
    """
    size = MAX_DOCUMENT_SIZE
    with open_bytes(file) as stream:
        rest = stream.read(size + 1)
        while len(rest) > size:
            end = rest.rfind(b"\n", 0, size) + 1
            if not end:
                end = size
                while end > size - 4 and rest[end] >> 6 == _CONTINUES:
                    end -= 1
            yield _decode(rest[:end])
            rest = rest[end:] + stream.read(end)
        yield _decode(rest)


def _decode(content: bytes) -> str | Skip:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return Skip(_NOT_UTF8)


def _columns(source: SourceConfig, keys: SourceKeys, rows: Iterable[Any]) -> Iterator[Any]:
    """Yield columns of rows. JSON rows may lack them, but not the first row of a file."""
    is_first = True
    for row in rows:
        if isinstance(row, Skip):
            yield row
            continue
        for leaf, name in source.columns.items() if is_first else ():
            if name not in row:
                raise UserError(
                    f"{keys.prefix}{leaf}={name!r} is not a column of {keys.path}="
                    f"{source.path!r}; the columns are: {', '.join(row)}"
                )
        is_first = False
        values = [row.get(name) for name in source.columns.values()]
        yield values[0] if source.format == "text" else values


def _table_rows(source: SourceConfig, file: Path | None, scratch: Path) -> Iterable[Any]:
    """Return a stream of the rows of a columnar file, or of a hub dataset."""
    import datasets  # noqa: PLC0415  # takes a second, which other sources save

    datasets.disable_progress_bars()
    datasets.config.TORCH_AVAILABLE = False  # a stream of it would import torch
    # Its error lines would repeat, with less context, the exceptions that follow.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    options: dict[str, Any]
    if file is not None:
        data_files = [glob.escape(str(file.absolute()))]
        options = {"path": source.source, "split": "train", "data_files": data_files}
    else:
        options = {"path": source.path, "name": source.hub_config, "split": source.hub_split}
        options["revision"] = source.hub_revision
    rows = datasets.load_dataset(**options, streaming=True, cache_dir=str(scratch))
    # Other columns would be decoded, and may hold images. Names may be unknown before reading.
    columns = [*source.columns.values()]
    if set(columns) <= set(rows.column_names or ()):
        rows = rows.select_columns(columns)
    return rows


def _json_lines(file: Path, keys: SourceKeys) -> Iterator[Any]:
    with open_bytes(file) as stream:
        for number in itertools.count(1):
            line = stream.readline(MAX_JSON_SIZE + 1)
            if not line:
                return
            if len(line) > MAX_JSON_SIZE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_READ_SIZE)
                yield Skip(f"longer than {MAX_JSON_SIZE >> 20} MiB")
            elif line.strip():
                yield _parse_line(f"{keys.path}: line {number} of {file}", line, keys)


def _parse_line(where: str, line: bytes, keys: SourceKeys) -> Any:
    text = _decode(line)
    if isinstance(text, Skip):
        return text
    try:
        row = _PARSER.decode(text.removeprefix("\ufeff"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error}); {keys.prefix}source=jsonl needs one object per "
            "line, or a file that is one array of objects"
        ) from error
    return _require_object(where, row)


def _require_object(where: str, row: object) -> object:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; write each document as {{"text": "..."}}')
    return row


def _json_array(file: Path, keys: SourceKeys) -> Iterator[Any]:
    """Yield the items of a file that is one array, with one block of it in memory.

    Bytes that are not UTF-8 become surrogates, so that only the strings with them are skipped.
    """
    with open_bytes(file) as stream:
        reader = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        text = reader.read(max(_START_BYTES, _READ_SIZE))
        place = _skip_space(text, 0) + 1  # after the bracket
        for number in itertools.count(1):
            while (found := _next_item(text, place)) is None:
                if len(text) - place > MAX_JSON_SIZE:
                    raise ValueError(f"item {number} is longer than {MAX_JSON_SIZE >> 20} MiB")
                # Twice as much each time, or a long item would be parsed over and over.
                more = reader.read(max(_READ_SIZE, len(text) - place))
                if not more:
                    raise ValueError(f"item {number} is incomplete or not JSON")
                text, place = text[place:] + more, 0
            item, place, is_end = found
            if is_end:
                break
            yield _require_object(f"{keys.path}: item {number} of {file}", item)
        rest = text[place:]
        while not rest.strip() and (more := reader.read(_READ_SIZE)):
            rest = more
        if rest.strip():
            raise ValueError("there is text after the end of the array")


def _next_item(text: str, place: int) -> tuple[Any, int, bool] | None:
    """Return (item, place after it and its comma, whether the array ends instead of an item).

    None: the text does not reach beyond the item. A number may continue in the text that follows.
    """
    place = _skip_space(text, place)
    if text.startswith("]", place):
        return None, place + 1, True
    try:
        item, end = _PARSER.raw_decode(text, place)
    except json.JSONDecodeError:
        return None
    end = _skip_space(text, end)
    if end == len(text):
        return None
    if text[end] not in ",]":
        raise ValueError(f"an item is followed by {text[end]!r}, not by , or ]")
    return item, end + (text[end] == ","), False


def _skip_space(text: str, place: int) -> int:
    return cast(re.Match[str], _SPACE.match(text, place)).end()
