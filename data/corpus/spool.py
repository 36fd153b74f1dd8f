"""The distinct documents of a source as UTF-8 text on disk.

A source is read once. Tokenizer training and encoding then read the spool by memory map, in any
order and with little memory. It takes as much disk as the text and is temporary.

    text     all documents, end to end
    sizes    int64 [n], bytes of each
    hashes   uint64 [n], xxh3_64 of each

Progress is made durable every 64 MiB; a killed preparation resumes from there.
"""

import contextlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from data.corpus.cache import open_at, replace_durably, sync_files
from data.segments import from_document

SPOOL_FILES = ("text", "sizes", "hashes")
_PROGRESS = "spool.progress.json"
_ITEM_BYTES = 8  # of a size and of a hash
_DURABLE_BYTES = 64 << 20  # text between two durable states
# Characters. Longer lines are cut: sentencepiece would drop those of more than 4192 bytes.
_SENTENCE_LENGTH = 1_000
_SCANNED_BYTES = 512 << 20  # text that is searched for evenly spread lines


class ReadCursor(NamedTuple):
    """Where reading resumes: a file of the source, and how many of its records to skip."""

    file: int = 0
    record: int = 0


START = ReadCursor()


class Record(NamedTuple):
    """A record of a source: its documents (one, unless it was cut), or why it was skipped."""

    texts: list[str]
    reason: str | None = None
    next: ReadCursor = START


@dataclass(frozen=True)
class Spool:
    """Documents by number, in source order, without duplicates."""

    text: mmap.mmap
    starts: npt.NDArray[np.int64]  # [n], bytes
    sizes: npt.NDArray[np.int64]  # [n], bytes
    hashes: npt.NDArray[np.uint64]  # [n], xxh3_64 of the UTF-8 text, all different
    has_segments: bool = False  # a document is a string of data/segments.py

    def __len__(self) -> int:
        return len(self.hashes)

    def document(self, index: int) -> str:
        """Return the text of one document."""
        return "".join(self.segments(index))

    def segments(self, index: int) -> list[str]:
        """Return the contexts and targets of one document in turn; see data/segments.py."""
        start = self.starts[index]
        content = self.text[start : start + self.sizes[index]].decode()
        return from_document(content) if self.has_segments else ["", content]

    def num_bytes(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the UTF-8 bytes of each of the documents."""
        return self.sizes[indices]


@dataclass
class SpoolProgress:
    """The state of reading that the files of a spool contain."""

    cursor: ReadCursor = START
    num_records: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # records, by reason


def write_spool(
    folder: Path,
    read: Callable[[ReadCursor], Iterable[Record]],
    on_progress: Callable[[ReadCursor, int], None] = lambda _cursor, _bytes: None,
) -> SpoolProgress:
    """Write the documents of a source, resuming an interrupted attempt; return the counts.

    Calls `on_progress(cursor, bytes of text)` at the start and after each record.
    """
    path, done = folder / _PROGRESS, SpoolProgress()
    if path.exists():
        done = SpoolProgress(**json.loads(path.read_bytes()))
    durable_bytes = done.text_bytes
    lengths = (done.text_bytes, *[_ITEM_BYTES * done.num_documents] * 2)
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open_at(folder / name, length))
            for name, length in zip(SPOOL_FILES, lengths, strict=True)
        ]

        def make_durable() -> None:
            sync_files(files)  # first: the progress must not be ahead of the files
            replace_durably(path, json.dumps(asdict(done)).encode())

        done.cursor = ReadCursor(*done.cursor)
        on_progress(done.cursor, done.text_bytes)
        for record in read(done.cursor):
            done.num_records += 1
            if record.reason is not None:
                done.skipped[record.reason] = done.skipped.get(record.reason, 0) + 1
            for document in record.texts:
                content = document.encode()
                content_hash = xxhash.xxh3_64_intdigest(content)
                files[0].write(content)
                files[1].write(len(content).to_bytes(_ITEM_BYTES, "little"))
                files[2].write(content_hash.to_bytes(_ITEM_BYTES, "little"))
                done.num_documents += 1
                done.text_bytes += len(content)
            done.cursor = record.next
            on_progress(done.cursor, done.text_bytes)
            if done.text_bytes - durable_bytes >= _DURABLE_BYTES:
                make_durable()
                durable_bytes = done.text_bytes
        make_durable()
    return done


def open_spool(folder: Path, *, has_segments: bool = False) -> Spool:
    """Map a spool of at least one document; of equal documents only the first one counts."""
    sizes = np.fromfile(folder / "sizes", "<i8")
    hashes = np.fromfile(folder / "hashes", "<u8")
    starts = np.cumsum(sizes) - sizes
    firsts = np.sort(np.unique(hashes, return_index=True)[1])
    with (folder / "text").open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Spool(text, starts[firsts], sizes[firsts], hashes[firsts], has_segments)


def sample_sentences(spool: Spool, indices: npt.NDArray[np.int64], max_bytes: int) -> Iterator[str]:
    """Yield evenly spread lines of the documents, about `max_bytes` in total, or all of them.

    Leading spaces are kept, so that indentation becomes pieces; newlines are not.
    """
    total_bytes = max(1, int(spool.num_bytes(indices).sum()))
    # A large corpus is scanned in part, by evenly spread documents.
    indices = indices[:: max(1, total_bytes // _SCANNED_BYTES)]
    total_bytes = max(1, int(spool.num_bytes(indices).sum()))
    number = 0
    for index in indices:
        for line in spool.document(int(index)).split("\n"):
            for start in range(0, len(line), _SENTENCE_LENGTH):
                # Picks max_bytes out of every total_bytes sentences, evenly spread.
                if number * max_bytes % total_bytes < max_bytes:
                    yield line[start : start + _SENTENCE_LENGTH]
                number += 1
