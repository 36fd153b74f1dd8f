"""The distinct documents of a source as UTF-8 text on disk.

A source is read once, in parts of consecutive files. Tokenizer training and encoding then read the
parts by memory map, in any order and with little memory. They take as much disk as the text and are
temporary. Each part is a folder:

    text     all documents, end to end
    sizes    int64 [n], bytes of each
    hashes   uint64 [n], xxh3_64 of each
    ids      uint32, tokens of the documents of a tokenized source, end to end
    counts   int64 [n], tokens of each; 0 in other sources

Progress is made durable every 64 MiB; a killed preparation resumes from there.
"""

import contextlib
import json
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from data.cache import replace_durably, sync_files
from data.corpus.segments import from_document

SPOOL_FILES = ("text", "sizes", "hashes", "ids", "counts")
_PROGRESS = "spool.progress.json"
_ITEM_BYTES = 8  # of a size, a hash and a count
_ID_DTYPE = np.dtype("<u4")
_NO_IDS = np.empty(0, _ID_DTYPE)
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
    ids: Sequence[npt.NDArray[np.integer]] = ()  # of each text, if the source is tokenized


@dataclass(frozen=True)
class Spool:
    """Documents by number, in source order, without duplicates."""

    texts: list[mmap.mmap]  # of the parts
    spans: npt.NDArray[np.int64]  # [n, 3]: part, first byte and number of bytes of a document
    hashes: npt.NDArray[np.uint64]  # [n], xxh3_64 of the UTF-8 text, all different
    has_segments: bool = False  # a document is a string of data/corpus/segments.py
    # Of a tokenized source: the tokens of each part, and where those of a document are.
    ids: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    id_spans: npt.NDArray[np.int64] | None = None  # [n, 3]: part, start, number of tokens

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """UTF-8 bytes of each document, `[n]`."""
        return self.spans[:, 2]

    def content(self, index: int) -> bytes:
        """Return the text of one document in UTF-8."""
        part, start, size = self.spans[index].tolist()
        return self.texts[part][start : start + size]

    def document(self, index: int) -> str:
        """Return the text of one document."""
        return "".join(self.segments(index))

    def segments(self, index: int) -> list[str]:
        """Return the contexts and targets of one document in turn; see data/corpus/segments.py."""
        content = self.content(index).decode()
        return from_document(content) if self.has_segments else ["", content]

    def tokens(self, index: int) -> npt.NDArray[np.uint32]:
        """Return the tokens that a tokenized source has for a document."""
        assert self.id_spans is not None, "the source is tokenized"
        part, start, count = self.id_spans[index].tolist()
        return self.ids[part][start : start + count]


@dataclass
class SpoolProgress:
    """The state of reading that the files of a spool contain."""

    cursor: ReadCursor = START
    num_records: int = 0
    num_documents: int = 0
    text_bytes: int = 0
    num_ids: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # records, by reason


def write_spool(
    folder: Path,
    read: Callable[[ReadCursor], Iterable[Record]],
    on_progress: Callable[[ReadCursor, int], None] = lambda _cursor, _bytes: None,
) -> None:
    """Write the documents of a source, resuming an interrupted attempt.

    Calls `on_progress(cursor, bytes of text)` at the start and after each record.
    """
    done = read_progress(folder)
    durable_bytes = done.text_bytes
    item_bytes = _ITEM_BYTES * done.num_documents
    id_bytes = _ID_DTYPE.itemsize * done.num_ids
    lengths = (done.text_bytes, item_bytes, item_bytes, id_bytes, item_bytes)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("ab")) for name in SPOOL_FILES]
        for file, length in zip(files, lengths, strict=True):
            file.truncate(length)
        texts, sizes, hashes, all_ids, counts = files

        def make_durable() -> None:
            sync_files(files)  # first: the progress must not be ahead of the files
            replace_durably(folder / _PROGRESS, json.dumps(asdict(done)).encode())

        done.cursor = ReadCursor(*done.cursor)
        on_progress(done.cursor, done.text_bytes)
        for record in read(done.cursor):
            done.num_records += 1
            if record.reason is not None:
                done.skipped[record.reason] = done.skipped.get(record.reason, 0) + 1
            for text, ids in zip(record.texts, record.ids or repeat(_NO_IDS), strict=False):
                content = text.encode()
                texts.write(content)
                all_ids.write(ids.astype(_ID_DTYPE).tobytes())
                content_hash = xxhash.xxh3_64_intdigest(content)
                numbers = {sizes: len(content), hashes: content_hash, counts: len(ids)}
                for file, number in numbers.items():
                    file.write(number.to_bytes(_ITEM_BYTES, "little"))
                done.num_ids += len(ids)
                done.num_documents += 1
                done.text_bytes += len(content)
            done.cursor = record.next
            on_progress(done.cursor, done.text_bytes)
            if done.text_bytes - durable_bytes >= _DURABLE_BYTES:
                make_durable()
                durable_bytes = done.text_bytes
        make_durable()


def read_progress(folder: Path) -> SpoolProgress:
    """Return the durable state of a spool, which has its counts when it is complete."""
    path = folder / _PROGRESS
    return SpoolProgress(**json.loads(path.read_bytes())) if path.exists() else SpoolProgress()


def summarise_reading(parts: Iterable[Path], num_distinct: int) -> dict[str, Any]:
    """Return the number of records in the parts, and of those skipped by reason."""
    reads = [read_progress(part) for part in parts]
    skipped = Counter(duplicate=sum(read.num_documents for read in reads) - num_distinct)
    for read in reads:
        skipped.update(read.skipped)
    return {
        "records": sum(read.num_records for read in reads),
        "skipped": {reason: count for reason, count in sorted(skipped.items()) if count},
    }


def open_spool(parts: Iterable[Path], *, has_segments: bool = False) -> Spool:
    """Map the parts of a source with at least one document; of equal documents the first counts."""
    parts = [part for part in parts if (part / "sizes").stat().st_size]
    sizes, hashes, counts = (
        [np.fromfile(part / name, dtype) for part in parts]
        for name, dtype in (("sizes", "<i8"), ("hashes", "<u8"), ("counts", "<i8"))
    )
    all_hashes = np.concatenate(hashes)
    firsts = np.sort(np.unique(all_hashes, return_index=True)[1])
    texts = [_map_bytes(part / "text") for part in parts]
    spool = Spool(texts, _spans(sizes)[firsts], all_hashes[firsts], has_segments)
    if not counts[0].any():
        return spool
    ids = [np.frombuffer(_map_bytes(part / "ids"), _ID_DTYPE) for part in parts]
    return replace(spool, ids=ids, id_spans=_spans(counts)[firsts])


def _spans(sizes: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return part, start and size of items that lie end to end in each part, `[n, 3]`."""
    spans = [
        np.stack([np.full_like(of_part, part), np.cumsum(of_part) - of_part, of_part], axis=1)
        for part, of_part in enumerate(sizes)
    ]
    return np.concatenate(spans)


def _map_bytes(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def sample_sentences(spool: Spool, indices: npt.NDArray[np.int64], max_bytes: int) -> Iterator[str]:
    """Yield evenly spread lines of the documents, about `max_bytes` in total, or all of them.

    Leading spaces are kept, so that indentation becomes pieces; newlines are not.
    """
    total_bytes = max(1, int(spool.sizes[indices].sum()))
    # A large corpus is scanned in part, by evenly spread documents.
    indices = indices[:: max(1, total_bytes // _SCANNED_BYTES)]
    total_bytes = max(1, int(spool.sizes[indices].sum()))
    number = 0
    for index in indices:
        for line in spool.document(int(index)).split("\n"):
            for start in range(0, len(line), _SENTENCE_LENGTH):
                # Picks max_bytes out of every total_bytes sentences, evenly spread.
                if number * max_bytes % total_bytes < max_bytes:
                    yield line[start : start + _SENTENCE_LENGTH]
                number += 1
