"""JSON in files, one value at a time, as long as it may be: lines, or the items of one array."""

import codecs
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data.corpus.compressed import open_bytes

LONGEST_VALUE = 256 << 20  # bytes of a line, characters of an item; it is in memory to be parsed
_READ_BYTES = 1 << 20
_START_BYTES = 1024  # in which the first character must be
_SPACE = " \t\r\n"
# Python refuses whole numbers beyond 4,300 digits; as no number is a text, it need not be exact.
PARSER = json.JSONDecoder(parse_int=float)


def is_array(file: Path) -> bool:
    """True if the first character of a file that means something opens an array."""
    with open_bytes(file) as stream:
        return stream.read(_START_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def lines(file: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file with their numbers; None for one that is too long to be read."""
    with open_bytes(file) as stream:
        for number in itertools.count(1):
            line = stream.readline(LONGEST_VALUE + 1)
            if not line:
                return
            if len(line) <= LONGEST_VALUE:
                yield number, line
                continue
            if not line.endswith(b"\n"):
                _pass_over_line(stream)
            yield number, None


def _pass_over_line(stream: IO[bytes]) -> None:
    while (part := stream.readline(_READ_BYTES)) and not part.endswith(b"\n"):
        pass


def array_items(file: Path) -> Iterator[Any]:
    """The items of a file that is one array.

    Raises ValueError if it is no such file. Bytes that are not UTF-8 become surrogates, so that it
    shows in the text that has them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    with open_bytes(file) as stream:
        content = stream.read(max(_START_BYTES, _READ_BYTES))
        text = decoder.decode(content).lstrip(f"\ufeff{_SPACE}").removeprefix("[")
        while True:
            text, items, is_at_end = _take_items(text, is_last=not content)
            yield from items
            if is_at_end:
                break
            if len(text) > LONGEST_VALUE:
                raise ValueError(f"an item is longer than {LONGEST_VALUE >> 20} MiB")
            # Twice as much each time, or a long item would be looked at over and over.
            content = stream.read(max(_READ_BYTES, len(text)))
            text += decoder.decode(content, final=not content)
        while not text.strip() and content:
            content = stream.read(_READ_BYTES)
            text = decoder.decode(content, final=not content)
        if text.strip():
            raise ValueError("there is something after the end of the array")


def _take_items(text: str, *, is_last: bool) -> tuple[str, list[Any], bool]:
    """Takes the items off the front of an array's text that are there in full.

    Returns (the rest, items, whether the array ended before the rest). `is_last`: no text follows.
    """
    items: list[Any] = []
    place = 0
    while True:
        place = _after_space(text, place)
        if text.startswith("]", place):
            return text[place + 1 :], items, True
        try:
            item, end = PARSER.raw_decode(text, place)
        except json.JSONDecodeError:
            if is_last:
                raise
            return text[place:], items, False
        end = _after_space(text, end)
        if end == len(text) and not is_last:  # a number may go on, and what follows is not known
            return text[place:], items, False
        if text[end : end + 1] not in (",", "]"):
            raise ValueError(f"after an item, there is {text[end : end + 1]!r}, not , or ]")
        items.append(item)
        place = end + text.startswith(",", end)


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place
