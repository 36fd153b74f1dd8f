"""Documents out of a source, one record after the other.

A document is one non-empty string: a text file, or the text column of a row. Whatever is not a
document is skipped with a reason; docs/data.md has the policy for each kind. Everything streams,
`datasets` leaves no copy of the corpus in its own cache, and about one document is in memory. Each
record says where reading goes on after it, so that a killed preparation need not begin again.

Text and JSON lines are decoded here. The builders of `datasets` would end at the first byte that is
not UTF-8; `text` would also translate line ends, and `json` would turn strings that look like dates
into dates and refuse files whose other columns change type half-way.
"""

import contextlib
import glob
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub

from configs.errors import UserError
from configs.schema import SourceConfig
from data.corpus import json_files
from data.corpus.compressed import open_bytes
from data.corpus.files import SourceKeys
from data.corpus.hub import requests_to_hub
from data.corpus.spool import Place, Record

# Bytes of a text file, characters elsewhere. A longer text becomes several documents, each far
# longer than any row.
LONGEST_DOCUMENT = 16 << 20
_CONTINUES = 0b10  # the upper bits of a byte that is not the first of its character
_NOT_UTF8 = "not UTF-8"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_NAMED = 10  # files named in the log because they are not UTF-8

_Item = TypeVar("_Item")

logger = logging.getLogger("microtron")


def read_records(
    source: SourceConfig,
    keys: SourceKeys,
    files: list[Path],
    scratch: Path,
    start: Place,
) -> Iterator[Record]:
    """Yields the records of a source in order, from a place on.

    `scratch` is a folder for the lock files that `datasets` makes. Raises UserError where the
    source cannot be read, naming the file, or lacks the column `text_field`.
    """
    datasets.disable_progress_bars()
    # Its own error lines would repeat, with less context, what is raised here.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    reader = _Reader(source, keys, scratch)
    places: list[Path | None] = [*files] if source.source != "hub" else [None]
    for number in range(start.file, len(places)):
        skip = start.record if number == start.file else 0
        for record, value in enumerate(reader.values(places[number], skip), start=skip + 1):
            texts, reason = value if isinstance(value, tuple) else _documents(value)
            yield Record(texts, reason, Place(number, record))
    reader.report()


def commit_of(source: SourceConfig, keys: SourceKeys) -> str:
    """Returns the commit that a hub dataset's revision stands for; empty for a local folder."""
    if source.path is None or Path(source.path).is_dir():
        return ""
    with requests_to_hub(f"{keys.path}={source.path!r} cannot be read:"):
        information = huggingface_hub.HfApi().dataset_info(
            source.path, revision=source.hub_revision
        )
    return information.sha or ""


def _documents(text: object) -> tuple[list[str], str | None]:
    """The documents of a value that should be a text, or why there are none."""
    if text is None:
        return [], "null"
    if not isinstance(text, str):
        return [], "not a string"
    if not text:
        return [], "empty"
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8 form.
    if _SURROGATE.search(text):
        return [], _NOT_UTF8
    return cut_text(text), None


def cut_text(text: str, longest: int = LONGEST_DOCUMENT) -> list[str]:
    """A text as documents of at most `longest` characters, cut after newlines where there are."""
    pieces, start = [], 0
    while len(text) - start > longest:
        newline = text.rfind("\n", start, start + longest)
        end = start + longest if newline < 0 else newline + 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


class _Reader:
    """Reads the files of one source."""

    def __init__(self, source: SourceConfig, keys: SourceKeys, scratch: Path) -> None:
        self._source, self._keys, self._scratch = source, keys, scratch
        self._undecodable: dict[str, None] = {}  # the first of these files, each once

    def values(self, file: Path | None, skip: int) -> Iterator[Any]:
        """Yields the value of each record of a file (None: of the hub dataset) but the first
        `skip`: what should be a text, or (documents, reason)."""
        if self._source.source in ("python_stdlib", "text"):
            assert file is not None
            return self._texts(file, skip)
        return self._column(file, skip)

    def report(self) -> None:
        """Names the files that are not UTF-8."""
        if names := self._undecodable:
            more = ", ..." if len(names) == _MAX_NAMED else ""
            logger.info("skipped what is not UTF-8 in files: %s%s", ", ".join(names), more)

    def _texts(self, file: Path, skip: int) -> Iterator[Any]:
        what = f"{self._keys.path}: {file} cannot be read"
        for content in itertools.islice(
            _errors_name(what, _stretches(file), _FILE_ERRORS), skip, None
        ):
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError:
                if len(self._undecodable) < _MAX_NAMED:
                    self._undecodable[file.name] = None
                yield [], _NOT_UTF8

    def _column(self, file: Path | None, skip: int) -> Iterator[Any]:
        """The values of the text column; a column that no row of a file's start has is an error."""
        name, is_first = self._source.text_field, not skip
        for row in self._rows(file, skip):
            if isinstance(row, tuple):
                yield row
                continue
            # A row of JSON may lack what others have; a column that is missing at once is a
            # mistake.
            if is_first and name not in row:
                raise UserError(
                    f"{self._keys.section}.text_field={name!r} is not a column of "
                    f"{self._keys.path}={self._source.path!r}; "
                    f"the columns there are: {', '.join(row)}"
                )
            is_first = False
            yield row.get(name)

    def _rows(self, file: Path | None, skip: int) -> Iterator[Any]:
        if file is None:
            return self._hub_rows(skip)
        if self._source.source != "jsonl":
            return self._columnar_rows(self._source.source, file, skip)
        if file.stat().st_size == 0:
            return iter(())
        with _errors_named(f"{self._keys.path}: {file} cannot be read"):
            is_array = json_files.is_array(file)
        rows = self._json_array(file) if is_array else self._json_lines(file)
        return itertools.islice(rows, skip, None)

    def _columnar_rows(self, builder: str, file: Path, skip: int) -> Iterator[Any]:
        def rows() -> Iterator[Any]:
            if file.stat().st_size == 0:  # a file without rows is no error
                return
            dataset = datasets.load_dataset(
                builder,
                data_files=[glob.escape(str(file.absolute()))],
                split="train",
                streaming=True,
                cache_dir=str(self._scratch),
            )
            yield from self._one_column(dataset, skip)

        return _errors_name(f"{self._keys.path}: {file} cannot be read as {builder}", rows())

    def _hub_rows(self, skip: int) -> Iterator[Any]:
        source, keys = self._source, self._keys

        def rows() -> Iterator[Any]:
            dataset = datasets.load_dataset(
                source.path,
                source.hub_config,
                split=source.hub_split,
                revision=source.hub_revision,
                streaming=True,
                cache_dir=str(self._scratch),
            )
            yield from self._one_column(dataset, skip)

        where = (
            f"{keys.path}={source.path!r} ({keys.section}.hub_config={source.hub_config}, "
            f"{keys.section}.hub_split={source.hub_split}, {keys.section}.hub_revision="
            f"{source.hub_revision}) cannot be read; check these keys and the network, or use a "
            f"local {keys.section}.source"
        )
        return _errors_name(where, rows(), Exception)  # its network layers have errors of their own

    def _one_column(self, dataset: Any, skip: int) -> Iterator[Any]:
        """Yields rows without other columns, which would be decoded (they may hold images)."""
        columns = dataset.column_names  # None where it is not known before reading
        if self._source.text_field in (columns or ()):
            dataset = dataset.select_columns([self._source.text_field])
        return iter(dataset.skip(skip) if skip else dataset)

    def _json_lines(self, file: Path) -> Iterator[Any]:
        numbered = json_files.lines(file)
        for number, line in _errors_name(f"{self._keys.path}: {file} cannot be read", numbered):
            if line is None:
                yield [], f"longer than {json_files.LONGEST_VALUE >> 20} MiB"
            elif line.strip():
                yield self._json_row(f"line {number} of {file}", line)

    def _json_row(self, where: str, line: bytes) -> Any:
        try:
            row = json_files.PARSER.decode(line.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError:
            return [], _NOT_UTF8
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(
                f"{self._keys.path}: {where} is not JSON ({error}); {self._keys.section}.source="
                "jsonl needs one object a line, or a file that is one array of objects"
            ) from error
        return self._object(where, row)

    def _object(self, where: str, row: object) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise UserError(
                f"{self._keys.path}: {where} is not a JSON object; write each document as "
                '{"text": "..."}'
            )
        return row

    def _json_array(self, file: Path) -> Iterator[dict[str, Any]]:
        """The items of a file that is one array, one by one."""
        where, items = (
            f"{self._keys.path}: {file} cannot be read as json",
            json_files.array_items(file),
        )
        for number, item in enumerate(_errors_name(where, items), start=1):
            yield self._object(f"item {number} of {file}", item)


def _stretches(file: Path, longest: int = LONGEST_DOCUMENT) -> Iterator[bytes]:
    """The content of a file, once, or if it is longer in stretches that end with a newline.

    Where there is no newline, at the end of a character.
    """
    with open_bytes(file) as stream:
        rest = stream.read(longest + 1)
        while len(rest) > longest:
            end = rest.rfind(b"\n", 0, longest) + 1
            if not end:
                end = longest
                while end > longest - 4 and rest[end] >> 6 == _CONTINUES:
                    end -= 1
            yield rest[:end]
            rest = rest[end:] + stream.read(end)
        yield rest


# That of a compressed file that was cut off is an EOFError.
_FILE_ERRORS = (OSError, EOFError)
# Those of pyarrow are ValueErrors, OSErrors or TypeErrors, that of JSON in a thousand brackets a
# RecursionError.
_READING_ERRORS = (*_FILE_ERRORS, ValueError, TypeError, RecursionError)


@contextlib.contextmanager
def _errors_named(
    where: str, kinds: type[Exception] | tuple[type[Exception], ...] = _READING_ERRORS
) -> Iterator[None]:
    """Says where it was that something went wrong."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{where}: {error}") from error


def _errors_name(
    where: str,
    items: Iterable[_Item],
    kinds: type[Exception] | tuple[type[Exception], ...] = _READING_ERRORS,
) -> Iterator[_Item]:
    """Yields the items; what goes wrong on the way says where."""
    iterator = iter(items)
    while True:
        with _errors_named(where, kinds):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
