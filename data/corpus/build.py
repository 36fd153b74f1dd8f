"""Text to a tokenized corpus in the cache.

[Note: preparation]
Beside what training reads (data/cached_corpus.py), `data.cache_directory` contains these folders,
named by a hash of everything that decides their content:

    text-...       the documents of a source as text, and their tokens in pieces, until all is done
    documents-...  hashes and sizes of the documents of a source, by which they are held out
    tokenizer-...  a tokenizer, by the text that it is trained on

A source in several mixtures with the same tokenizer is tokenized once, unless the other sources
change what is held out of it (data/corpus/split.py). An interrupted attempt to fill a folder is
resumed.

[Note: sharing work]
Any number of processes, on one host or several, may build the same folders at once, whether they
train or run `python -m data.prepare`. They share reading (parts of consecutive files) and
tokenizing (pieces of consecutive documents): each takes the parts that no other one holds the lock
of, also those that a killed process left. Neither how many they are nor who does what changes a
byte. One process trains the tokenizer, and one joins the pieces. The folder `text-...` is deleted
by the last process that uses it: all of them hold a shared lock on it.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from configs.errors import UserError
from configs.schema import DataConfig, SourceConfig, WeightedSource
from data import cache
from data.cached_corpus import (
    RECIPE_VERSION,
    SAMPLE_BYTES,
    SPLITS,
    FoundSource,
    cache_directory,
    corpus_entry,
    find_text,
    given_tokenizer,
    join_hashes,
    key_of,
)
from data.corpus import encoding, entries, report
from data.corpus import split as splitting
from data.corpus import spool as spools
from data.corpus.encoding import Piece
from data.corpus.megatron import read_tokenized
from data.corpus.sources import read_records
from data.corpus.split import END_HELD_OUT, HELD_OUT, TRAINED_ON, Division, Split
from data.corpus.tokenizer_training import train_tokenizer
from data.source_files import SourceKeys
from data.token_file import PARTS, TARGETS, open_token_file
from data.tokenizer import Tokenizer, load_tokenizer

_TRAINED = "tokenizer.model"
_COMMIT = "commit.txt"
_PART_BYTES = 64 << 20  # files that a process reads on its own, unless one is larger

Fill = Callable[[Path], None]  # fills the folder of an entry
logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Source:
    """A source of the configuration, and the folders of its text and documents."""

    keys: SourceKeys
    config: WeightedSource
    files: list[Path]
    fingerprint: str
    text: Path
    documents: Path
    tokenizer: Tokenizer | None  # of a tokenized source
    first: float  # where this process begins, see share_jobs

    @property
    def parts(self) -> dict[Path, list[Path]]:
        """The folders of the parts of the text, each with its files."""
        if not self.files:
            return {self.text / "0": []}
        groups: dict[int, list[Path]] = {}
        starts = accumulate((file.stat().st_size for file in self.files), initial=0)
        for file, start in zip(self.files, starts, strict=False):
            groups.setdefault(start // _PART_BYTES, []).append(file)
        # In numbers of files, so that the names tell the content.
        ends = accumulate(map(len, groups.values()))
        return {
            self.text / f"{end - len(files)}-{end}": files
            for end, files in zip(ends, groups.values(), strict=True)
        }


def build_corpus(config: DataConfig, first: float = 0.0) -> int:
    """Put the corpus of `config` into the cache; return how many of its tokens are new there.

    Other processes may build it too; this one begins `first` (0 to 1) of the way, see
    [Note: sharing work]. Raises UserError if source, tokenizer or settings do not fit together.
    """
    folder = cache_directory(config)
    entries.remove_abandoned(folder)
    given = given_tokenizer(config)
    found = find_text(config)
    sources, held_out = ([_in_folder(f, folder, given, first) for f in part] for part in found)
    everything = [*sources, *held_out]
    for source in entries.rotated(everything, first):
        fill = partial(_read_documents, source)
        entries.require_entry(source.documents, fill, [source.text])
    splits = _splits(config, sources, held_out)
    tokenizer = given or _trained_tokenizer(config, sources, splits)
    jobs, num_new = [], list[int]()
    for source, split in zip(everything, splits, strict=True):
        parts = (source.fingerprint, config.validation_fraction, tokenizer.fingerprint)
        key = key_of(*parts, xxh3_128_hexdigest(split.tobytes()))
        tokenize = partial(_tokenize, source, split, config, tokenizer, num_new)
        jobs.append((folder / f"tokens-{key}", tokenize, [source.text]))
    for job in entries.rotated(jobs, first):
        entries.require_entry(*job)
    _delete_texts(everything)
    facts = _facts(config, everything, [tokens for tokens, *_ in jobs], tokenizer)
    facts["text_fingerprint"] = found.fingerprint
    _write_facts(corpus_entry(config, found, given), facts)
    return sum(num_new)


def _write_facts(entry: Path, facts: dict[str, Any]) -> None:
    """Make the entry of a corpus, unless it is there with the same facts.

    Other facts are those of another commit of the hub, or of a library that trains another
    tokenizer, of which this cache has been cleared in part.
    """

    def has_them() -> bool:
        return cache.is_complete(entry) and facts.items() <= cache.read_header(entry).items()

    if not has_them():
        with cache.locked([entry]):
            if cache.is_complete(entry) and not has_them():
                shutil.rmtree(entry)
            entries.build_entry(entry, lambda work: cache.write_header(work, [], facts))


def _in_folder(found: FoundSource, folder: Path, given: Tokenizer | None, first: float) -> Source:
    decoder = given if found.config.source == "megatron" else None
    name = key_of(found.fingerprint, *([decoder.fingerprint] if decoder else []))
    text, documents = folder / f"{entries.TEXT}{name}", folder / f"documents-{name}"
    return Source(*found, text, documents, decoder, first)


def _facts(
    config: DataConfig, sources: list[Source], folders: list[Path], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return what is known about a corpus, given the folders of its tokens."""
    headers, n = [cache.read_header(folder) for folder in folders], len(config.mixture)
    summaries = [header["summary"] for header in headers]
    summary = report.joined_summary(dict(zip(config.mixture, summaries, strict=False)))
    if held_out := dict(zip(config.mixture, summaries[n:], strict=False)):
        # The held-out documents of the sources are among those given.
        excluded = summary["validation"]["documents"]
        given = report.joined_summary(held_out)["validation"]
        summary = {**summary, "excluded": excluded, "validation": given}
    fingerprints = [header["fingerprint"] for header in headers]
    is_evaluated = bool(held_out) or config.validation_fraction > 0
    return {
        "tokens": [folder.name for folder in folders],
        "tokenizer": tokenizer.file_name,
        "fingerprint": join_hashes(fingerprints) if fingerprints[1:] else fingerprints[0],
        "summary": summary,
        "description": [*report.describe(summary), *_commits(sources)],
        "warnings": [*report.corpus_warnings(summary, is_evaluated=is_evaluated)],
    }


def _delete_texts(sources: list[Source]) -> None:
    """Delete the texts of sources, except those that another process uses: it deletes them."""
    for source in sources:
        if source.text.exists():
            with contextlib.suppress(BlockingIOError), cache.locked([source.text], wait=False):
                shutil.rmtree(source.text, ignore_errors=True)


def _commits(sources: list[Source]) -> Iterator[str]:
    """Yield the commits of hub datasets, which stay those that were first read into the cache."""
    for source in sources:
        if commit := cache.read_header(source.documents)["commit"]:
            yield f"{source.keys.path}={source.config.path}: commit {commit} of the hub"


def _read_text(source: Source) -> spools.Spool:
    """Open the text of a source, after reading it together with other processes if needed.

    The caller holds a shared lock on `source.text`.
    """
    keys, config, parts = source.keys, source.config, source.parts
    if not all(map(Path.exists, parts)):
        logger.info("preparing %ssource=%s: reading documents", keys.prefix, config.source)
        sizes = {part: sum(f.stat().st_size for f in files) for part, files in parts.items()}
        for part, reach in entries.share_jobs("reading", sizes, source.first):
            entries.build_entry(part, partial(_fill_part, source, parts[part], reach))
    if not any(spools.read_progress(part).num_documents for part in parts):
        skipped = spools.summarise_reading(parts, 0)["skipped"]
        shutil.rmtree(source.text)
        raise UserError(
            f"{keys.prefix}source={config.source} with {keys.path}={config.path!r} "
            f"{report.no_documents(config, skipped)}"
        )
    return spools.open_spool(parts, has_segments=config.format != "text")


def _fill_part(source: Source, files: list[Path], reach: Callable[[int], None], work: Path) -> None:
    """Read the documents of some files of a source."""
    config: SourceConfig = source.config
    if config.source == "hub":
        config = replace(config, hub_revision=_pin_commit(source, work))
    ends = [0, *accumulate(file.stat().st_size for file in files)]
    scratch = work / "datasets"

    def on_progress(cursor: spools.ReadCursor, text_bytes: int) -> None:
        # Text and file differ in size, but what was read ends within the file of the cursor.
        if files:
            first, last = ends[cursor.file : cursor.file + 2]
            text_bytes = min(max(first, text_bytes), last)
        reach(text_bytes)

    read: Callable[[spools.ReadCursor], Iterable[spools.Record]]
    read = partial(read_records, config, source.keys, files, scratch)
    if source.tokenizer is not None:
        read = partial(read_tokenized, files, source.keys, source.tokenizer)
    spools.write_spool(work, read, on_progress)
    shutil.rmtree(scratch, ignore_errors=True)
    cache.sync_directory(work)


def _pin_commit(source: Source, work: Path) -> str | None:
    """Return the commit of a hub dataset that earlier attempts read, or its current one."""
    # Here, not at the top: other sources do not need the library, which takes time to import.
    from data.corpus.hub import commit_of  # noqa: PLC0415

    path = work / _COMMIT
    if not path.exists():
        known = cache.read_header(source.documents)["commit"] if source.documents.exists() else ""
        cache.write_durably(path, (known or commit_of(source.config, source.keys)).encode())
    return path.read_text("utf-8") or None


def _read_documents(source: Source) -> Fill:
    """Read a source; return what stores hashes and sizes of its documents."""
    spool = _read_text(source)

    def fill(work: Path) -> None:
        for name in splitting.DOCUMENT_FILES:
            cache.write_durably(work / name, getattr(spool, name).tobytes())
        commit = source.text / "0" / _COMMIT
        facts = {"commit": commit.read_text("utf-8") if commit.exists() else ""}
        cache.write_header(work, list(splitting.DOCUMENT_FILES), facts)

    return fill


def _divided_text(source: Source, split: Split, config: DataConfig) -> Division:
    """Open the text of a source, divided into the splits; the lock is that of `_read_text`."""
    spool = _read_text(source)
    if not np.array_equal(spool.hashes, splitting.read_documents(source.documents).hashes):
        shutil.rmtree(source.documents)
        raise UserError(
            f"{source.keys.path}={source.config.path!r} has changed since it was first read; start "
            "again to use its current documents"
        )
    return splitting.divide(spool, split, config.validation_fraction)


def _splits(config: DataConfig, sources: list[Source], held_out: list[Source]) -> list[Split]:
    """Return the splits of all sources, then those of the held-out sources."""
    documents = [splitting.read_documents(s.documents) for s in (*sources, *held_out)]
    if not held_out:
        splits = splitting.split_by_hash(documents, config.validation_fraction)
        for source, split in zip(sources, splits, strict=True):
            if source.config.format != "text":  # a conversation has no end that could be held out
                split[split == END_HELD_OUT] = TRAINED_ON
        return splits
    given = np.concatenate([hashes for hashes, _ in documents[len(sources) :]])
    splits = [np.isin(hashes, given).astype(np.uint8) for hashes, _ in documents]
    for source, split in zip(sources, splits, strict=False):
        if (split == HELD_OUT).all():
            raise UserError(
                f"every document of {source.keys.path}={source.config.path!r} is held out by "
                "validation_path, so there is nothing to train on; give other text in one of them"
            )
    return splits


def _trained_tokenizer(config: DataConfig, sources: list[Source], splits: list[Split]) -> Tokenizer:
    """Load the tokenizer that is trained on the training text of all sources."""
    is_mixture = len(sources) > 1  # otherwise the weight has no effect
    parts = [
        [
            s.fingerprint,
            xxh3_128_hexdigest(split.tobytes()),
            s.config.weight if is_mixture else None,
        ]
        for s, split in zip(sources, splits, strict=False)
    ]
    recipe = [config.padded_vocab_size, RECIPE_VERSION, SAMPLE_BYTES, config.validation_fraction]
    entry = cache_directory(config) / f"tokenizer-{key_of(recipe, parts)}"
    if is_mixture and not entry.exists():
        logger.info(
            "to change data.sources later without tokenizing all of them again, keep this "
            "tokenizer: data.tokenizer=%s",
            entry / _TRAINED,
        )

    def fill(work: Path) -> None:
        """Train on lines of each source, shared by their weights."""
        parts = [
            _divided_text(*of_source, config) for of_source in zip(sources, splits, strict=False)
        ]
        available = [int(part.spool.sizes[part.train].sum()) for part in parts]
        shares = sample_shares([source.config.weight for source in sources], available)
        sentences: list[str] = []
        for part, share in zip(parts, shares, strict=True):
            sentences += spools.sample_sentences(part.spool, part.train, share)
        logger.info("training a tokenizer of data.vocab_size=%d pieces", config.padded_vocab_size)
        model = train_tokenizer(sentences, config.padded_vocab_size)
        cache.write_durably(work / _TRAINED, model)
        cache.write_header(work, [_TRAINED], {})

    texts = [source.text for source in sources]
    entries.require_entry(entry, lambda: fill, texts)
    return load_tokenizer(entry / _TRAINED, "the cached tokenizer")


def sample_shares(weights: list[float], available: list[int]) -> list[int]:
    """Divide SAMPLE_BYTES by weights; the others take over what a source does not have."""
    shares, left, weight_left = [0] * len(weights), SAMPLE_BYTES, sum(weights)
    # Sources with the least text for their weight come first.
    for number in sorted(range(len(weights)), key=lambda i: available[i] / weights[i]):
        share = round(left * weights[number] / max(weight_left, weights[number]))
        # A single source gets everything, however little text it has.
        shares[number] = share if len(weights) == 1 else min(available[number], share)
        left, weight_left = left - shares[number], weight_left - weights[number]
    return shares


def _tokenize(
    source: Source, split: Split, config: DataConfig, tokenizer: Tokenizer, num_new: list[int]
) -> Fill:
    """Tokenize a source together with other processes; return what joins its tokens.

    Appends the numbers of new tokens to `num_new`.
    """
    started_at, pieces = time.perf_counter(), {}
    division = _divided_text(source, split, config)
    for name, documents in zip(SPLITS, (division.train, division.validation), strict=True):
        pieces[name], new = encoding.encode_pieces(
            source.text, name, division.spool, documents, tokenizer, source.first
        )
        num_new.append(new)

    def fill(work: Path) -> None:
        _fill_tokens(source, division, pieces, tokenizer, work)
        elapsed_s = time.perf_counter() - started_at
        logger.info("tokenized %s in %.1f s", source.keys.prefix.rstrip("."), elapsed_s)

    return fill


def _fill_tokens(
    source: Source,
    division: Division,
    pieces: dict[str, list[Piece]],
    tokenizer: Tokenizer,
    work: Path,
) -> None:
    """Write the token files and the tokenizer of a source."""
    spool = division.spool
    cache.write_durably(work / tokenizer.file_name, tokenizer.content)
    summary = spools.summarise_reading(source.parts, len(spool) - division.num_ends)
    summary["ends_held_out"] = division.num_ends
    for name, indices in zip(SPLITS, (division.train, division.validation), strict=True):
        encoding.write_token_file(work, name, pieces[name], spool, indices)
        tokens = open_token_file(work, name, tokenizer.vocab_size)
        summary[name] = report.split_summary(tokens, spool, indices, tokenizer)
    parts = (*PARTS, TARGETS) if spool.has_segments else PARTS
    names = [tokenizer.file_name, *(f"{name}.{part}" for name in SPLITS for part in parts)]
    content = b"".join(cache.file_digest(work / name) for name in names)
    facts = {"fingerprint": xxh3_128_hexdigest(content), "vocab_size": tokenizer.vocab_size}
    cache.write_header(work, names, {**facts, "summary": summary})
