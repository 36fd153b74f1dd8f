"""Turn sources into a tokenized corpus in the cache, once.

[Note: cache]
`data.cache_directory` contains folders named by a hash of everything that decides their content:

    text-...       the documents of a source as text, and their tokens in pieces, until all is done
    documents-...  hashes and sizes of the documents of a source, by which they are held out
    tokenizer-...  a tokenizer, by the text that it is trained on
    tokens-...     a source with one split, tokenized by one tokenizer

Local rank 0 of each host builds what its disk lacks; the other ranks wait for the folders. A source
in several mixtures with the same tokenizer is tokenized once, unless the other sources change what
is held out of it (data/corpus/split.py). Each folder is filled by a `_fill_*` function, which
resumes an interrupted attempt.

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
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from configs.errors import UserError
from configs.schema import DataConfig, SourceConfig, WeightedSource
from data.corpus import cache, report
from data.corpus.files import SourceKeys, source_files, source_fingerprint
from data.corpus.megatron import read_tokenized
from data.corpus.split import (
    DOCUMENT_FILES,
    END_HELD_OUT,
    HELD_OUT,
    TRAINED_ON,
    Division,
    Split,
    divide,
    read_documents,
    split_by_given,
    split_by_hash,
    write_documents,
)
from data.corpus.spool import (
    ReadCursor,
    Record,
    Spool,
    open_spool,
    read_progress,
    sample_sentences,
    write_spool,
)
from data.token_file import (
    PARTS,
    TARGETS,
    JoinedTokens,
    Piece,
    TokenFile,
    Tokens,
    encode_pieces,
    open_token_file,
    write_token_file,
)
from data.tokenizer import RECIPE_VERSION, Tokenizer, load_tokenizer, train_tokenizer

FORMAT_VERSION = 3
SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer learns from: about 200,000 lines
SPLITS = ("train", "validation")
_TRAINED = "tokenizer.model"
_COMMIT = "commit.txt"
_PART_BYTES = 64 << 20  # files that a process reads on its own, unless one is larger

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
    given = _given_tokenizer(config)
    sources, held_out = _find_sources(config, given, first)
    for source in cache.rotated([*sources, *held_out], first):
        _require_documents(source, is_builder)
    splits = _splits(config, sources, held_out)
    tokenizer = given or _trained_tokenizer(config, sources, splits, is_builder)
    entries = []
    for source, split in zip((*sources, *held_out), splits, strict=True):
        parts = (source.fingerprint, config.validation_fraction, tokenizer.fingerprint)
        entries.append(folder / f"tokens-{_key(*parts, xxh3_128_hexdigest(split.tobytes()))}")
    everything = list(zip((*sources, *held_out), splits, entries, strict=True))
    num_new_tokens = sum(
        _require_tokens(entry, source, split, config, tokenizer, is_builder)
        for source, split, entry in cache.rotated(everything, first)
    )
    corpus = replace(_open(sources, held_out, entries, tokenizer), num_new_tokens=num_new_tokens)
    if is_builder:
        _delete_texts([*sources, *held_out])
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


def text_fingerprint(config: DataConfig) -> str:
    """Return a hash of the content of the sources, without reading it as text."""
    return _text_fingerprint(*_find_sources(config, None))


def _require_documents(source: Source, is_builder: bool) -> None:
    """Return when the hashes and sizes of a source's documents are in the cache."""
    if not is_builder:
        cache.wait_for_entry(source.documents)
    elif not cache.is_complete(source.documents):
        with cache.locked([source.text], shared=True):
            if not cache.is_complete(source.documents):  # else another process has built it
                fill = partial(_fill_documents, source, _read_text(source))
                with cache.locked([source.documents]):
                    cache.build_entry(source.documents, fill)


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


def _read_text(source: Source) -> Spool:
    """Open the text of a source, after reading it together with other processes if needed.

    The caller holds a shared lock on `source.text`.
    """
    parts = _parts(source)
    jobs = [
        cache.Job(
            part,
            sum(file.stat().st_size for file in files),
            partial(_build_part, source, part, files),
        )
        for part, files in parts.items()
    ]
    if not all(map(Path.exists, parts)):
        section, kind = source.keys.section, source.config.source
        logger.info("preparing %s.source=%s: reading documents", section, kind)
        cache.share_jobs("reading", jobs, source.first)
    read = _read_counts(source)
    if not read["num_documents"]:
        shutil.rmtree(source.text)
        skipped = report.describe_counts(read["skipped"]) or "nothing"
        raise UserError(
            f"{source.keys.section}.source={source.config.source} with {source.keys.path}="
            f"{source.config.path!r} yields no documents; skipped: {skipped}; give non-empty "
            "UTF-8 text"
        )
    return open_spool(list(parts), has_segments=source.config.format != "text")


def _parts(source: Source) -> dict[Path, list[Path]]:
    """Return the folders of the parts of a source's text, each with its files."""
    if not source.files:
        return {source.text / "0": []}
    groups: dict[int, list[Path]] = {}
    starts = accumulate((file.stat().st_size for file in source.files), initial=0)
    for file, start in zip(source.files, starts, strict=False):
        groups.setdefault(start // _PART_BYTES, []).append(file)
    ends = accumulate(map(len, groups.values()))  # in numbers of files, so they name the content
    return {
        source.text / f"{end - len(files)}-{end}": files
        for end, files in zip(ends, groups.values(), strict=True)
    }


def _build_part(
    source: Source, part: Path, files: list[Path], reach: Callable[[int], None]
) -> None:
    cache.build_entry(part, partial(_fill_part, source, files, reach))


def _fill_part(source: Source, files: list[Path], reach: Callable[[int], None], work: Path) -> None:
    """Read the documents of some files of a source."""
    config: SourceConfig = source.config
    if config.source == "hub":
        config = replace(config, hub_revision=_pin_commit(source, work))
    ends = [0, *accumulate(file.stat().st_size for file in files)]
    scratch = work / "datasets"

    def on_progress(cursor: ReadCursor, text_bytes: int) -> None:
        # Text and file differ in size, but what was read ends within the file of the cursor.
        if files:
            first, last = ends[cursor.file : cursor.file + 2]
            text_bytes = min(max(first, text_bytes), last)
        reach(text_bytes)

    read: Callable[[ReadCursor], Iterable[Record]]
    if source.tokenizer is not None:
        read = partial(read_tokenized, files, source.keys, source.tokenizer)
    else:
        # Here, not at the top: most starts read nothing, and the libraries take time to import.
        from data.corpus.sources import read_records  # noqa: PLC0415

        read = partial(read_records, config, source.keys, files, scratch)
    write_spool(work, read, on_progress)
    shutil.rmtree(scratch, ignore_errors=True)
    cache.sync_directory(work)


def _read_counts(source: Source) -> dict[str, Any]:
    """Sum what reading the parts of a source counted."""
    parts = [read_progress(part) for part in _parts(source)]
    skipped: Counter[str] = Counter()
    for part in parts:
        skipped.update(part.skipped)
    return {
        "num_records": sum(part.num_records for part in parts),
        "num_documents": sum(part.num_documents for part in parts),
        "skipped": dict(skipped),
    }


def _pin_commit(source: Source, work: Path) -> str | None:
    """Return the commit of a hub dataset that earlier attempts read, or its current one."""
    from data.corpus.hub import commit_of  # noqa: PLC0415

    path = work / _COMMIT
    if not path.exists():
        known = cache.read_header(source.documents)["commit"] if source.documents.exists() else ""
        cache.write_durably(path, (known or commit_of(source.config, source.keys)).encode())
    return path.read_text("utf-8") or None


def _fill_documents(source: Source, spool: Spool, work: Path) -> None:
    """Store hashes and sizes of the documents of a source, which outlive its text."""
    write_documents(work, spool)
    commit = source.text / "0" / _COMMIT
    facts = {"commit": commit.read_text("utf-8") if commit.exists() else ""}
    cache.write_header(work, list(DOCUMENT_FILES), facts)


def _divided_text(source: Source, split: Split, config: DataConfig) -> Division:
    """Open the text of a source, divided into the splits; the lock is that of `_read_text`."""
    spool = _read_text(source)
    # The content of a hub dataset in a local folder has no fingerprint.
    if not np.array_equal(spool.hashes, read_documents(source.documents).hashes):
        shutil.rmtree(source.documents)
        raise UserError(
            f"{source.keys.path}={source.config.path!r} has changed since it was first read; start "
            "again to use its current documents"
        )
    return divide(spool, split, config.validation_fraction)


def _splits(config: DataConfig, sources: list[Source], held_out: list[Source]) -> list[Split]:
    """Return the splits of all sources, then those of the held-out sources."""
    documents = [read_documents(source.documents) for source in sources]
    if not held_out:
        splits = split_by_hash(documents, config.validation_fraction)
        for source, split in zip(sources, splits, strict=True):
            if source.config.format != "text":  # a conversation has no end that could be held out
                split[split == END_HELD_OUT] = TRAINED_ON
        return splits
    given = [read_documents(source.documents) for source in held_out]
    splits = split_by_given(documents, given)
    for source, split in zip(sources, splits, strict=True):
        if (split == HELD_OUT).all():
            raise UserError(
                f"every document of {source.keys.path}={source.config.path!r} is held out by "
                "validation_path, so there is nothing to train on; give other text in one of them"
            )
    return [*splits, *split_by_given(given, given)]


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    path = Path(config.tokenizer).expanduser()
    return load_tokenizer(path, bos_token=config.bos_token, eos_token=config.eos_token)


def _trained_tokenizer(
    config: DataConfig, sources: list[Source], splits: list[Split], is_builder: bool
) -> Tokenizer:
    """Load the tokenizer that is trained on the training text of all sources."""
    is_mixture = len(sources) > 1  # otherwise the weight has no effect
    parts = [
        [
            source.fingerprint,
            xxh3_128_hexdigest(split.tobytes()),
            source.config.weight if is_mixture else None,
        ]
        for source, split in zip(sources, splits, strict=False)
    ]
    recipe = [config.padded_vocab_size, RECIPE_VERSION, SAMPLE_BYTES, config.validation_fraction]
    entry = Path(config.cache_directory).expanduser() / f"tokenizer-{_key(recipe, parts)}"
    if is_builder and is_mixture and not entry.exists():
        logger.info(
            "to change data.sources later without tokenizing all of them again, keep this "
            "tokenizer: data.tokenizer=%s",
            entry / _TRAINED,
        )
    if not is_builder:
        cache.wait_for_entry(entry)
    elif not cache.is_complete(entry):
        with cache.locked([entry]):
            cache.build_entry(entry, partial(_fill_tokenizer, config, sources, splits))
    return load_tokenizer(entry / _TRAINED, "the cached tokenizer")


def _fill_tokenizer(
    config: DataConfig, sources: list[Source], splits: list[Split], work: Path
) -> None:
    """Train a tokenizer on lines of each source, shared by their weights."""
    sentences: list[str] = []
    with cache.locked([source.text for source in sources], shared=True):
        parts = [
            _divided_text(source, split, config)
            for source, split in zip(sources, splits, strict=False)
        ]
        available = [int(part.spool.num_bytes(part.train).sum()) for part in parts]
        shares = sample_shares([source.config.weight for source in sources], available)
        for part, share in zip(parts, shares, strict=True):
            sentences.extend(sample_sentences(part.spool, part.train, share))
    logger.info("training a tokenizer of data.vocab_size=%d pieces", config.padded_vocab_size)
    model = train_tokenizer(sentences, config.padded_vocab_size)
    cache.write_durably(work / _TRAINED, model)
    cache.write_header(work, [_TRAINED], {"format_version": FORMAT_VERSION})


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


def _require_tokens(
    entry: Path,
    source: Source,
    split: Split,
    config: DataConfig,
    tokenizer: Tokenizer,
    is_builder: bool,
) -> int:
    """Return when a source is tokenized, with the number of new tokens if this process helped."""
    if not is_builder:
        cache.wait_for_entry(entry)
        return 0
    if cache.is_complete(entry):
        return 0
    started_at, num_new_tokens = time.perf_counter(), 0
    with cache.locked([source.text], shared=True):
        if cache.is_complete(entry):  # another process has built it
            return 0
        division, pieces = _divided_text(source, split, config), {}
        for name, documents in zip(SPLITS, (division.train, division.validation), strict=True):
            pieces[name], num_new = encode_pieces(
                source.text, name, division.spool, documents, tokenizer, source.first
            )
            num_new_tokens += num_new
        with cache.locked([entry]):
            if not cache.is_complete(entry):
                fill = partial(_fill_tokens, source, division, pieces, tokenizer)
                cache.build_entry(entry, fill)
                elapsed_s = time.perf_counter() - started_at
                logger.info("tokenized %s in %.1f s", source.keys.section, elapsed_s)
    return num_new_tokens


def _fill_tokens(
    source: Source,
    division: Division,
    pieces: dict[str, list[Piece]],
    tokenizer: Tokenizer,
    work: Path,
) -> None:
    """Write the token files and the tokenizer of a source."""
    texts = division.spool
    cache.write_durably(work / tokenizer.file_name, tokenizer.content)
    num_read = len(texts) - division.num_ends
    summary = report.read_summary(_read_counts(source), num_read)
    summary["ends_held_out"] = division.num_ends
    for name, indices in zip(SPLITS, (division.train, division.validation), strict=True):
        write_token_file(work, name, pieces[name], texts, indices)
        tokens = open_token_file(work, name, tokenizer.vocab_size)
        summary[name] = report.split_summary(tokens, texts, indices, tokenizer)
    parts = (*PARTS, TARGETS) if texts.has_segments else PARTS
    names = [tokenizer.file_name, *(f"{name}.{part}" for name in SPLITS for part in parts)]
    content = b"".join(cache.file_digest(work / name) for name in names)
    facts: dict[str, Any] = {
        "fingerprint": xxh3_128_hexdigest(content),
        "format_version": FORMAT_VERSION,
    }
    facts |= {"vocab_size": tokenizer.vocab_size, "summary": summary}
    cache.write_header(work, names, facts)


def _open(
    sources: list[Source], held_out: list[Source], entries: list[Path], tokenizer: Tokenizer
) -> Corpus:
    headers = [cache.read_header(entry) for entry in entries]
    train, validation = (
        [open_token_file(entry, split, tokenizer.vocab_size) for entry in entries]
        for split in SPLITS
    )
    num_sources = len(sources)
    summaries = [
        (source.keys.section, header["summary"])
        for source, header in zip((*sources, *held_out), headers, strict=True)
    ]
    summary = report.joined_summary(dict(summaries[:num_sources]))
    if held_out:
        validation = validation[num_sources:]
        # The held-out documents of the sources are among those given.
        given = report.joined_summary(dict(summaries[num_sources:]))["validation"]
        excluded = summary["validation"]["documents"]
        summary = {**summary, "excluded": excluded, "validation": given}
    fingerprints = [header["fingerprint"] for header in headers]
    return Corpus(
        tokenizer=tokenizer,
        tokenizer_path=entries[0] / tokenizer.file_name,
        train=_join_tokens(train[:num_sources]),
        validation=_join_tokens(validation),
        fingerprint=fingerprints[0] if len(entries) == 1 else _join_hashes(fingerprints),
        summary=summary,
        weights=tuple(source.config.weight for source in sources),
        text_fingerprint=_text_fingerprint(sources, held_out),
        validation_weights=tuple(source.config.weight for source in held_out) or None,
    )


def _join_tokens(files: Sequence[TokenFile]) -> Tokens:
    return files[0] if len(files) == 1 else JoinedTokens(files)


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
