"""The distinct documents of a source as UTF-8 text on disk.

A source is read once, whatever it is; tokenizer training and encoding then read from here by memory
map, in any order and with little memory. A spool takes as much disk as the text and is temporary.

    text     all documents, end to end
    sizes    int64 [n], bytes of each
    hashes   uint64 [n], xxh3_64 of each

Now and then everything up to a place of the source is made durable; a preparation that was killed
goes on from there.
"""

import contextlib
import json
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from data.corpus.durable import open_at, replace_durably, sync_files

SPOOL_FILES = ("text", "sizes", "hashes")


class Place(NamedTuple):
    """Where reading goes on: in which file of the source, and after how many of its records."""

    file: int = 0
    record: int = 0


class Record(NamedTuple):
    """One record of a source: its documents, mostly one, or why there is none."""

    texts: list[str]
    reason: str | None
    next: Place


_PROGRESS = "progress.json"
_ITEM_BYTES = 8  # of a size and of a hash
_DURABLE_BYTES = 64 << 20  # text between two times that it is made durable
# Characters. Longer lines are cut: sentencepiece would drop those of more than 4192 bytes.
_SENTENCE_LENGTH = 1_000
_LOOKED_AT_BYTES = 512 << 20  # of text, in search of lines that are spread evenly


@dataclass(frozen=True)
class Spool:
    """Documents by number, in source order, each once."""

    text: mmap.mmap | bytes
    starts: npt.NDArray[np.int64]  # [n], bytes
    sizes: npt.NDArray[np.int64]  # [n], bytes
    hashes: npt.NDArray[np.uint64]  # [n], xxh3_64 of the UTF-8 text; all different

    def __len__(self) -> int:
        return len(self.hashes)

    def document(self, index: int) -> str:
        """Returns the text of one document."""
        start = self.starts[index]
        return self.text[start : start + self.sizes[index]].decode()

    def num_bytes(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the UTF-8 bytes of each of the documents."""
        return self.sizes[indices]


@dataclass
class SpoolProgress:
    """What the files of a spool have in them."""

    place: Place = field(default_factory=Place)
    num_records: int = 0
    num_documents: int = 0
    num_added: int = 0  # documents beyond the first of a record
    num_with_nul: int = 0  # documents, which are kept
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # records, by reason

    @classmethod
    def stored(cls, values: dict[str, Any]) -> "SpoolProgress":
        """Its `vars`, from JSON."""
        place, skipped = Place(*values["place"]), Counter(values["skipped"])
        return cls(**{**values, "place": place, "skipped": skipped})


def write_spool(
    folder: Path,
    read: Callable[[Place], Iterable[Record]],
    told: Callable[[Place, int], None] = lambda _place, _bytes: None,
) -> SpoolProgress:
    """Writes the documents of a source, from where an earlier attempt got to; returns the counts.

    `told` gets to know the place in the source and the bytes of text, at first and after records.
    """
    progress = folder / _PROGRESS
    stored = json.loads(progress.read_text()) if progress.exists() else None
    done = SpoolProgress() if stored is None else SpoolProgress.stored(stored)
    durable_bytes = done.text_bytes
    lengths = (done.text_bytes, *[_ITEM_BYTES * done.num_documents] * 2)
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(open_at(folder / name, length))
            for name, length in zip(SPOOL_FILES, lengths, strict=True)
        ]

        def make_durable() -> None:
            # The files come first: what the progress tells of must be in them.
            sync_files(files)
            replace_durably(progress, json.dumps(vars(done)).encode())

        told(done.place, done.text_bytes)
        for record in read(done.place):
            done.num_records += 1
            if record.reason is not None:
                done.skipped[record.reason] += 1
            done.num_added += max(0, len(record.texts) - 1)
            for document in record.texts:
                content = document.encode()
                for file, item in zip(files, _items(content), strict=True):
                    file.write(item)
                done.num_documents += 1
                done.num_with_nul += b"\0" in content
                done.text_bytes += len(content)
            done.place = record.next
            told(done.place, done.text_bytes)
            if done.text_bytes - durable_bytes >= _DURABLE_BYTES:
                make_durable()
                durable_bytes = done.text_bytes
        make_durable()
    return done


def _items(content: bytes) -> tuple[bytes, bytes, bytes]:
    """What a document adds to each file."""
    content_hash = xxhash.xxh3_64_intdigest(content)
    return (
        content,
        len(content).to_bytes(_ITEM_BYTES, "little"),
        content_hash.to_bytes(_ITEM_BYTES, "little"),
    )


def open_spool(folder: Path) -> Spool:
    """Maps a spool; of documents that are there twice, only the first one counts."""
    sizes = np.fromfile(folder / "sizes", "<i8")
    hashes = np.fromfile(folder / "hashes", "<u8")
    starts = np.cumsum(sizes) - sizes
    firsts = np.sort(np.unique(hashes, return_index=True)[1])
    text: mmap.mmap | bytes = b""
    if len(firsts):  # an empty file cannot be mapped
        with (folder / "text").open("rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Spool(text, starts[firsts], sizes[firsts], hashes[firsts])


def close_spool(spool: Spool) -> None:
    """Unmaps the text."""
    if isinstance(spool.text, mmap.mmap):
        spool.text.close()


def sample_sentences(spool: Spool, indices: npt.NDArray[np.int64], max_bytes: int) -> Iterator[str]:
    """Yields evenly spread lines of the documents, about `max_bytes` of them or all if there are
    fewer.

    Leading spaces are kept, so that indentation becomes pieces; newlines are not part of any line.
    """
    total_bytes = max(1, int(spool.num_bytes(indices).sum()))
    # Of much text, evenly spread documents will do: to look at all of it would take long.
    indices = indices[:: max(1, total_bytes // _LOOKED_AT_BYTES)]
    total_bytes = max(1, int(spool.num_bytes(indices).sum()))
    number = 0
    for index in indices:
        for line in spool.document(int(index)).split("\n"):
            for start in range(0, len(line), _SENTENCE_LENGTH):
                # Picks max_bytes out of every total_bytes sentences, at even distances.
                if number * max_bytes % total_bytes < max_bytes:
                    yield line[start : start + _SENTENCE_LENGTH]
                number += 1
