"""How each folder of the cache is filled: the text of a source, its documents, a tokenizer, tokens.

Each function fills a folder that is not yet in its place, and goes on where an earlier attempt left
off. `data/corpus/prepare.py` says which folders there are.
"""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from configs.schema import DataConfig, WeightedSource
from data.corpus.cache import build_entry, read_header, write_header
from data.corpus.durable import write_durably
from data.corpus.files import SourceKeys, file_digest
from data.corpus.progress import Progress
from data.corpus.report import (
    describe_counts,
    read_summary,
    require_all_accounted_for,
    split_summary,
)
from data.corpus.split import DOCUMENT_FILES, Split, divide, read_documents, write_documents
from data.corpus.spool import (
    SPOOL_FILES,
    Place,
    Spool,
    SpoolProgress,
    close_spool,
    open_spool,
    sample_sentences,
    write_spool,
)
from data.token_file import PARTS, PROGRESS, open_token_file, write_token_file
from data.tokenizer import Tokenizer, train_tokenizer

FORMAT_VERSION = 3
SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer learns from: about 200,000 lines
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "validation")
_COMMIT = "commit.txt"

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Source:
    """A source of the configuration, and the folders of its text and of what its documents are."""

    keys: SourceKeys
    config: WeightedSource
    files: list[Path]
    fingerprint: str
    text: Path
    documents: Path


def fill_text(source: Source, work: Path) -> None:
    """Reads the documents of a source."""
    # Here, not at the top: importing `datasets` takes a second, and most starts need no reading.
    from data.corpus.sources import commit_of, read_records  # noqa: PLC0415

    config = source.config
    logger.info("preparing %s.source=%s: reading documents", source.keys.section, config.source)
    if config.source == "hub":
        # What was read and what is read later must be of one state of the dataset.
        commit = work / _COMMIT
        if not commit.exists():
            known = read_header(source.documents)["commit"] if source.documents.exists() else ""
            write_durably(commit, (known or commit_of(config, source.keys)).encode())
        config = replace(config, hub_revision=commit.read_text() or None)
    scratch = work / "datasets"
    read = partial(read_records, config, source.keys, source.files, scratch)
    total_bytes = sum(file.stat().st_size for file in source.files) if source.files else None
    with Progress("reading", total_bytes) as progress:
        done = write_spool(work, read, _reading(source.files, progress))
    shutil.rmtree(scratch, ignore_errors=True)
    if not done.num_documents:
        raise UserError(
            f"{source.keys.section}.source={config.source} with {source.keys.path}={config.path!r} "
            f"yields no documents; skipped: {describe_counts(done.skipped) or 'nothing'}; give "
            "non-empty UTF-8 text"
        )
    write_header(work, list(SPOOL_FILES), {"read": vars(done)})


def _reading(files: list[Path], progress: Progress) -> Callable[[Place, int], None]:
    """Turns a place in the source and the bytes of text so far into bytes of files."""
    before = list(accumulate((file.stat().st_size for file in files), initial=0))
    file, first_text_bytes, last_text_bytes = -1, 0, 0

    def told(place: Place, text_bytes: int) -> None:
        nonlocal file, first_text_bytes, last_text_bytes
        if not files:  # of a hub dataset
            progress.reach(text_bytes)
            return
        if place.file != file:
            file, first_text_bytes = place.file, last_text_bytes
        last_text_bytes = text_bytes
        progress.reach(min(before[file + 1], before[file] + text_bytes - first_text_bytes))

    return told


def fill_documents(source: Source, work: Path) -> None:
    """Keeps hashes and sizes of the documents of a source, so that its text need not be."""
    build_entry(source.text, partial(fill_text, source))
    spool = open_spool(source.text)
    write_documents(work, spool)
    close_spool(spool)
    commit = source.text / _COMMIT
    facts = {"commit": commit.read_text() if commit.exists() else ""}
    write_header(work, list(DOCUMENT_FILES), facts)


def fill_tokenizer(
    config: DataConfig, sources: list[Source], splits: list[Split], work: Path
) -> None:
    """Trains a tokenizer on lines of each source, as much as their weights say or as there is."""
    parts = [
        divide(_spooled(source)[0], split, config.validation_fraction)
        for source, split in zip(sources, splits, strict=False)
    ]
    available = [int(part.spool.num_bytes(part.train).sum()) for part in parts]
    shares = sample_shares([source.config.weight for source in sources], available)
    sentences: list[str] = []
    for part, share in zip(parts, shares, strict=True):
        sentences.extend(sample_sentences(part.spool, part.train, share))
        close_spool(part.spool)
    logger.info("training a tokenizer of data.vocab_size=%d pieces", config.vocab_size)
    write_durably(work / TOKENIZER, train_tokenizer(sentences, config.vocab_size))
    write_header(work, [TOKENIZER], {"format_version": FORMAT_VERSION})


def sample_shares(weights: list[float], available: list[int]) -> list[int]:
    """Divides SAMPLE_BYTES by weights; what a source does not have goes to the others."""
    shares, left, weight_left = [0] * len(weights), SAMPLE_BYTES, sum(weights)
    # Those that have least for their weight come first.
    for number in sorted(range(len(weights)), key=lambda i: available[i] / weights[i]):
        share = round(left * weights[number] / max(weight_left, weights[number]))
        # One source alone is given the whole, however little it has.
        shares[number] = share if len(weights) == 1 else min(available[number], share)
        left, weight_left = left - shares[number], weight_left - weights[number]
    return shares


def _spooled(source: Source) -> tuple[Spool, SpoolProgress]:
    """The documents of a source, read now unless they have been; the caller holds its lock."""
    build_entry(source.text, partial(fill_text, source))
    spool = open_spool(source.text)
    # Of a hub dataset in a folder, only its name is known.
    if not np.array_equal(spool.hashes, read_documents(source.documents).hashes):
        shutil.rmtree(source.documents)
        raise UserError(
            f"{source.keys.path}={source.config.path!r} has other documents than when it was first "
            "read; start again, and what it has now is used"
        )
    return spool, SpoolProgress.stored(read_header(source.text)["read"])


def _text(spool: Spool, indices: npt.NDArray[np.int64], number: int) -> str:
    return spool.document(int(indices[number]))


def fill_tokens(
    source: Source, split: Split, config: DataConfig, tokenizer: Tokenizer, work: Path
) -> None:
    """Writes token files, tokenizer and, last, the header."""
    started_at = time.perf_counter()
    spool, read = _spooled(source)
    division = divide(spool, split, config.validation_fraction)
    texts = division.spool
    write_durably(work / TOKENIZER, tokenizer.model)
    summary = {**read_summary(read, spool), "ends_held_out": division.num_ends}
    for name, indices in zip(SPLITS, (division.train, division.validation), strict=True):
        write_token_file(work, name, texts, indices, tokenizer)
        tokens = open_token_file(work, name, tokenizer.vocab_size)
        summary[name] = split_summary(tokens, partial(_text, texts, indices), tokenizer)
    close_spool(spool)
    require_all_accounted_for(work, summary)
    names = [TOKENIZER, *(f"{name}.{part}" for name in SPLITS for part in PARTS)]
    digest = xxhash.xxh3_128(b"".join(file_digest(work / name) for name in names))
    facts = {"fingerprint": digest.hexdigest(), "format_version": FORMAT_VERSION}
    write_header(work, names, {**facts, "vocab_size": tokenizer.vocab_size, "summary": summary})
    for name in SPLITS:
        (work / f"{name}.{PROGRESS}").unlink()
    logger.info("tokenized %s in %.1f s", source.keys.section, time.perf_counter() - started_at)
