"""Turn sources into a tokenized corpus in the cache, once.

[Note: cache]
`data.cache_directory` contains folders named by a hash of everything that decides their content:

    text-...       the documents of a source as text, and their tokens in pieces, until all is done
    documents-...  hashes and sizes of the documents of a source, by which they are held out
    tokenizer-...  a tokenizer, by the text that it is trained on
    tokens-...     a source with one split, tokenized by one tokenizer

Local rank 0 of each host builds what its disk lacks; the other ranks wait for the folders. A source
in several mixtures with the same tokenizer is tokenized once, unless the other sources change what
is held out of it (data/corpus/split.py). An interrupted attempt to fill a folder is resumed.

[Note: sharing work]
Any number of processes, on one host or several, may build the same folders at once, whether they
train or run `python -m data.prepare`. They share reading (parts of consecutive files) and
tokenizing (pieces of consecutive documents): each takes the parts that no other one holds the lock
of, also those that a killed process left. Neither how many they are nor who does what changes a
byte. One process trains the tokenizer, and one joins the pieces. The folder `text-...` is deleted
by the last process that uses it: all of them hold a shared lock on it.
"""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from configs.errors import UserError
from configs.schema import DataConfig, SourceConfig, WeightedSource
from data import token_file
from data.corpus import cache, report
from data.corpus import split as splitting
from data.corpus import spool as spools
from data.corpus.files import SourceKeys, source_files, source_fingerprint
from data.corpus.megatron import read_tokenized
from data.corpus.sources import read_records
from data.corpus.split import END_HELD_OUT, HELD_OUT, TRAINED_ON, Division, Split
from data.token_file import PARTS, TARGETS, JoinedTokens, Piece, Tokens, open_token_file
from data.tokenizer import RECIPE_VERSION, Tokenizer, load_tokenizer, train_tokenizer

FORMAT_VERSION = 3
SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer learns from: about 200,000 lines
SPLITS = ("train", "validation")
_TRAINED = "tokenizer.model"
_COMMIT = "commit.txt"
_PART_BYTES = 64 << 20  # files that a process reads on its own, unless one is larger

Fill = Callable[[Path], None]  # fills the folder of an entry
logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus, which training and evaluation read."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    train: Tokens
    validation: Tokens
    fingerprint: str  # hex; equal if and only if tokenizer, tokens and splits are
    summary: dict[str, Any]  # see data/corpus/report.py
    weights: tuple[float, ...] = (1.0,)  # of the sources, which are the parts of both splits
    text_fingerprint: str = ""  # hex, of the content of the sources
    validation_weights: tuple[float, ...] | None = None  # of the parts of given held-out text
    num_new_tokens: int = 0  # those that were not in the cache before


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


def prepare_corpus(
    config: DataConfig, seq_length: int, local_rank: int, first: float = 0.0
) -> Corpus:
    """Open the corpus of `config` from the cache; local rank 0 builds what is missing.

    Other processes may build it too; this one begins `first` (0 to 1) of the way, see
    [Note: sharing work]. Raises UserError if source, tokenizer or settings do not fit together.
    """
    folder, is_builder = Path(config.cache_directory).expanduser(), local_rank == 0
    if is_builder:
        cache.remove_abandoned(folder)
    given = None
    if config.tokenizer is not None:
        path = Path(config.tokenizer).expanduser()
        given = load_tokenizer(path, bos_token=config.bos_token, eos_token=config.eos_token)
    sources, held_out = _find_sources(config, given, first)
    everything = [*sources, *held_out]
    for source in cache.rotated(everything, first):
        fill = partial(_read_documents, source)
        cache.require_entry(source.documents, fill, [source.text], is_builder=is_builder)
    splits = _splits(config, sources, held_out)
    tokenizer = given or _trained_tokenizer(config, sources, splits, is_builder)
    jobs, num_new = [], list[int]()
    for source, split in zip(everything, splits, strict=True):
        parts = (source.fingerprint, config.validation_fraction, tokenizer.fingerprint)
        key = _key(*parts, xxh3_128_hexdigest(split.tobytes()))
        tokenize = partial(_tokenize, source, split, config, tokenizer, num_new)
        jobs.append((folder / f"tokens-{key}", tokenize, [source.text]))
    for job in cache.rotated(jobs, first):
        cache.require_entry(*job, is_builder=is_builder)
    entries = [entry for entry, *_ in jobs]
    corpus = replace(_open(sources, held_out, entries, tokenizer), num_new_tokens=sum(num_new))
    if is_builder:
        _delete_texts(everything)
        _log_commits(everything)
        more = f" and {len(entries) - 1} more" if entries[1:] else ""
        logger.info("corpus %s%s: %s", entries[0], more, report.describe(corpus.summary))
        is_evaluated = bool(held_out) or config.validation_fraction > 0
        for warning in report.corpus_warnings(corpus.summary, is_evaluated=is_evaluated):
            logger.warning("%s", warning)
    _check_rows(sources, config, corpus, seq_length)
    return corpus


def _delete_texts(sources: list[Source]) -> None:
    """Delete the texts of sources, except those that another process uses: it deletes them."""
    for source in sources:
        if source.text.exists():
            with contextlib.suppress(BlockingIOError), cache.locked([source.text], wait=False):
                shutil.rmtree(source.text, ignore_errors=True)


def _log_commits(sources: list[Source]) -> None:
    """Log the commits of hub datasets, which stay those that were first read into the cache."""
    for source in sources:
        if commit := cache.read_header(source.documents)["commit"]:
            logger.info("%s=%s: commit %s of the hub", source.keys.path, source.config.path, commit)


def text_fingerprint(config: DataConfig) -> str:
    """Return a hash of the content of the sources, without reading it as text."""
    return _text_fingerprint(*_find_sources(config, None))


def _text_fingerprint(sources: list[Source], held_out: list[Source]) -> str:
    given = ["held out:", *(source.fingerprint for source in held_out)] if held_out else []
    return _join_hashes([*(source.fingerprint for source in sources), *given])


def _join_hashes(hashes: list[str]) -> str:
    return xxh3_128_hexdigest(" ".join(hashes).encode())


def _key(*parts: object) -> str:
    return xxh3_128_hexdigest(json.dumps([FORMAT_VERSION, *parts]).encode())


def _find_sources(
    config: DataConfig, tokenizer: Tokenizer | None, first: float = 0.0
) -> tuple[list[Source], list[Source]]:
    """Return the sources to train on, and the held-out sources that are given."""
    folder = Path(config.cache_directory).expanduser()

    def find(keys: SourceKeys, source: WeightedSource) -> Source:
        files = source_files(source, keys)
        fingerprint = source_fingerprint(source, files, folder)
        decoder = tokenizer if source.source == "megatron" else None
        name = _key(fingerprint, *([decoder.fingerprint] if decoder else []))
        text, documents = folder / f"{cache.TEXT}{name}", folder / f"documents-{name}"
        return Source(keys, source, files, fingerprint, text, documents, decoder, first)

    sources, held_out = [], []
    for key, source in config.mixture.items():
        sources.append(find(SourceKeys(key, f"{key}.path"), source))
        if source.validation_path is not None:
            given = replace(source, path=source.validation_path, hub_revision=None)
            held_out.append(find(SourceKeys(key, f"{key}.validation_path"), given))
    return sources, held_out


def _read_text(source: Source) -> spools.Spool:
    """Open the text of a source, after reading it together with other processes if needed.

    The caller holds a shared lock on `source.text`.
    """
    keys, config, parts = source.keys, source.config, source.parts
    if not all(map(Path.exists, parts)):
        logger.info("preparing %s.source=%s: reading documents", keys.section, config.source)
        sizes = {part: sum(f.stat().st_size for f in files) for part, files in parts.items()}
        for part, reach in cache.share_jobs("reading", sizes, source.first):
            cache.build_entry(part, partial(_fill_part, source, parts[part], reach))
    if not any(spools.read_progress(part).num_documents for part in parts):
        skipped = spools.summarise_reading(parts, 0)["skipped"]
        shutil.rmtree(source.text)
        raise UserError(
            f"{keys.section}.source={config.source} with {keys.path}={config.path!r} yields no "
            f"documents; skipped: {report.describe_counts(skipped) or 'nothing'}; give non-empty "
            "UTF-8 text"
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


def _trained_tokenizer(
    config: DataConfig, sources: list[Source], splits: list[Split], is_builder: bool
) -> Tokenizer:
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
    entry = Path(config.cache_directory).expanduser() / f"tokenizer-{_key(recipe, parts)}"
    if is_builder and is_mixture and not entry.exists():
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
    cache.require_entry(entry, lambda: fill, texts, is_builder=is_builder)
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
        pieces[name], new = token_file.encode_pieces(
            source.text, name, division.spool, documents, tokenizer, source.first
        )
        num_new.append(new)

    def fill(work: Path) -> None:
        _fill_tokens(source, division, pieces, tokenizer, work)
        elapsed_s = time.perf_counter() - started_at
        logger.info("tokenized %s in %.1f s", source.keys.section, elapsed_s)

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
        token_file.write_token_file(work, name, pieces[name], spool, indices)
        tokens = open_token_file(work, name, tokenizer.vocab_size)
        summary[name] = report.split_summary(tokens, spool, indices, tokenizer)
    parts = (*PARTS, TARGETS) if spool.has_segments else PARTS
    names = [tokenizer.file_name, *(f"{name}.{part}" for name in SPLITS for part in parts)]
    content = b"".join(cache.file_digest(work / name) for name in names)
    facts = {"fingerprint": xxh3_128_hexdigest(content), "vocab_size": tokenizer.vocab_size}
    cache.write_header(work, names, {**facts, "summary": summary})


def _open(
    sources: list[Source], held_out: list[Source], entries: list[Path], tokenizer: Tokenizer
) -> Corpus:
    headers, n = [cache.read_header(entry) for entry in entries], len(sources)
    train, validation = (
        [open_token_file(entry, split, tokenizer.vocab_size) for entry in entries]
        for split in SPLITS
    )
    summaries = [
        (source.keys.section, header["summary"])
        for source, header in zip((*sources, *held_out), headers, strict=True)
    ]
    summary = report.joined_summary(dict(summaries[:n]))
    if held_out:
        validation = validation[n:]
        # The held-out documents of the sources are among those given.
        given = report.joined_summary(dict(summaries[n:]))["validation"]
        excluded = summary["validation"]["documents"]
        summary = {**summary, "excluded": excluded, "validation": given}
    fingerprints = [header["fingerprint"] for header in headers]
    return Corpus(
        tokenizer=tokenizer,
        tokenizer_path=entries[0] / tokenizer.file_name,
        train=JoinedTokens(train[:n]) if train[:n][1:] else train[0],
        validation=JoinedTokens(validation) if validation[1:] else validation[0],
        fingerprint=_join_hashes(fingerprints) if fingerprints[1:] else fingerprints[0],
        summary=summary,
        weights=tuple(source.config.weight for source in sources),
        text_fingerprint=_text_fingerprint(sources, held_out),
        validation_weights=tuple(source.config.weight for source in held_out) or None,
    )


def _check_rows(sources: list[Source], config: DataConfig, corpus: Corpus, seq_length: int) -> None:
    """Raise UserError if a source does not fill a row, naming the longest row that all fill."""
    if config.sequence_mode != "pack" or config.packing == "best_fit":
        return
    num_tokens = [tokens.num_tokens for tokens in corpus.train.parts]
    fewest = min(num_tokens)
    source = sources[num_tokens.index(fewest)]
    if fewest <= seq_length:
        raise UserError(
            f"the {fewest} training tokens of {source.keys.section}.source={source.config.source} "
            f"do not fill a row of model.seq_length={seq_length}; use more text, model.seq_length="
            f"{fewest - 1} or less, or data.sequence_mode=pad"
        )
