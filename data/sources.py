"""Documents out of a source, read through Hugging Face `datasets`.

A document is one non-empty string: a text file, or the text column of a row. Whatever is not a
document is skipped and counted by reason. Everything streams, so `datasets` leaves no copy of the
corpus in its own cache, and one document at a time is in memory.

Text and JSON are decoded here. The builders of `datasets` would end at the first byte that is not
UTF-8; `text` would also translate line ends, and `json` would turn strings that look like dates
into dates and refuse files whose other columns change type half-way.
"""

import glob
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import datasets

from configs.schema import DataConfig

_NOT_UTF8 = "not UTF-8"
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAMES_SHOWN = 10  # files named in the log line about undecodable ones

_Item = TypeVar("_Item")

logger = logging.getLogger("microtron")


def read_documents(
    config: DataConfig, files: list[Path], scratch: Path, skipped: Counter[str]
) -> Iterator[str]:
    """Yields the source's documents in order; adds to `skipped` what was passed over, by reason.

    `scratch` is a folder for the lock files that `datasets` makes. Raises ValueError where the
    source cannot be read, or lacks the column `data.text_field`.
    """
    datasets.disable_progress_bars()
    # Its own error lines would repeat, with less context, what is raised here.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if config.source in ("python_stdlib", "text"):
        yield from _text_documents(files, skipped)
        return
    for rows in _tables(config, files, scratch, skipped):
        for number, row in enumerate(rows):
            # A row of JSON may lack what others have; a column that is missing at once is a
            # mistake.
            if number == 0 and config.text_field not in row:
                raise ValueError(
                    f"data.text_field={config.text_field!r} is not a column of data.path="
                    f"{config.path!r}; the columns there are: {', '.join(row)}"
                )
            text: Any = row.get(config.text_field)
            reason = _reason_to_skip(text)
            if reason is None:
                yield text
            else:
                skipped[reason] += 1


def _reason_to_skip(text: object) -> str | None:
    if text is None:
        return "null"
    if not isinstance(text, str):
        return "not a string"
    if not text:
        return "empty"
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8 form.
    return _NOT_UTF8 if _SURROGATE.search(text) else None


def _text_documents(files: list[Path], skipped: Counter[str]) -> Iterator[str]:
    undecodable = []
    # A table of names in memory, streamed: unlike a generator it needs no folder in any cache.
    names_only = datasets.Dataset.from_dict({"file": [str(file) for file in files]})
    for row in names_only.to_iterable_dataset().map(_add_text):
        if row["text"] is None:
            skipped[_NOT_UTF8] += 1
            undecodable.append(row["file"])
        elif not row["text"]:
            skipped["empty"] += 1
        else:
            yield row["text"]
    if undecodable:
        names = ", ".join(Path(name).name for name in undecodable[:_NAMES_SHOWN])
        more = ", ..." if len(undecodable) > _NAMES_SHOWN else ""
        logger.info("skipped %d files that are not UTF-8: %s%s", len(undecodable), names, more)


def _add_text(row: dict[str, str]) -> dict[str, str | None]:
    try:
        return {"text": Path(row["file"]).read_bytes().decode("utf-8")}
    except UnicodeDecodeError:
        return {"text": None}


def _tables(
    config: DataConfig, files: list[Path], scratch: Path, skipped: Counter[str]
) -> Iterator[Iterator[dict[str, Any]]]:
    """Yields the rows of each file, or those of the hub dataset."""
    if config.source == "hub":
        yield _hub_rows(config, scratch)
        return
    # One dataset a file: columns may differ between files, and a file without rows is no error.
    for file in files:
        if file.stat().st_size == 0:
            continue
        if config.source != "jsonl":
            yield _columnar_rows(config.source, config.text_field, file, scratch)
        elif _begins_with_bracket(file):
            yield _columnar_rows("json", config.text_field, file, scratch)
        else:
            yield _json_line_rows(file, scratch, skipped)


def _columnar_rows(
    builder: str, text_field: str, file: Path, scratch: Path
) -> Iterator[dict[str, Any]]:
    def rows() -> Iterator[dict[str, Any]]:
        yield from _text_column(_open_file(builder, file, scratch), text_field)

    return _errors_name(f"data.path: {file} cannot be read as {builder}", rows())


def _hub_rows(config: DataConfig, scratch: Path) -> Iterator[dict[str, Any]]:
    def rows() -> Iterator[dict[str, Any]]:
        dataset = datasets.load_dataset(
            config.path,
            config.hub_config,
            split=config.hub_split,
            revision=config.hub_revision,
            streaming=True,
            cache_dir=str(scratch),
        )
        yield from _text_column(dataset, config.text_field)

    where = (
        f"data.path={config.path!r} (data.hub_config={config.hub_config}, data.hub_split="
        f"{config.hub_split}, data.hub_revision={config.hub_revision}) cannot be read; "
        "check these keys and the network, or use a local data.source"
    )
    return _errors_name(where, rows())


def _text_column(dataset: Any, text_field: str) -> Iterator[dict[str, Any]]:
    """Yields rows without the other columns, before those are decoded (they may hold images)."""
    columns = dataset.column_names  # None where it is not known before reading
    return iter(dataset.select_columns([text_field]) if text_field in (columns or ()) else dataset)


def _json_line_rows(file: Path, scratch: Path, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    def lines() -> Iterator[bytes]:
        # latin-1 maps bytes to characters one to one, so that lines arrive as the bytes they are.
        dataset = _open_file("text", file, scratch, encoding="latin-1", keep_linebreaks=True)
        yield from (row["text"].encode("latin-1") for row in dataset)

    named_lines = _errors_name(f"data.path: {file} cannot be read", lines())
    for number, line in enumerate(named_lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError:
            skipped[_NOT_UTF8] += 1
            continue
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data.path: line {number} of {file} is not JSON ({error}); data.source=jsonl "
                "needs one object a line, or a file that is one array of objects"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"data.path: line {number} of {file} is not a JSON object; write each document as "
                '{"text": "..."}'
            )
        yield row


def _begins_with_bracket(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1024).lstrip().startswith(b"[")


def _open_file(builder: str, file: Path, scratch: Path, **options: Any) -> Any:
    return datasets.load_dataset(
        builder,
        data_files=[glob.escape(str(file.absolute()))],
        split="train",
        streaming=True,
        cache_dir=str(scratch),
        **options,
    )


def _errors_name(where: str, items: Iterable[_Item]) -> Iterator[_Item]:
    """Yields the items; what goes wrong on the way says where.

    pyarrow's errors are ValueErrors, OSErrors or TypeErrors, those of the hub OSErrors.
    """
    try:
        yield from items
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
