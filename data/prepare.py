"""From sources to a tokenized corpus in the cache, once.

[Note: cache]
`data.cache_directory` holds folders named by a hash of all that decides what is in them:

    text-...       the text of a source as documents, until it has been tokenized
    tokenizer-...  a tokenizer, by the text that it is trained on
    tokens-...     one source tokenized by one tokenizer

Local rank 0 of each host makes what its disk lacks; the other ranks wait for the folders. A source
that is in several mixtures with the same tokenizer is tokenized once. A start that finds
everything looks at the source's files and reads only those that it has not seen before.
"""

import json
import logging
import shutil
import time
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from configs.schema import DataConfig, WeightedSource
from data.cache import (
    build_entry,
    is_whole,
    locked,
    read_header,
    remove_abandoned,
    wait_for_entry,
    write_header,
)
from data.durable import write_durably
from data.files import file_digest, source_files, source_fingerprint
from data.mixture import JoinedTokens
from data.progress import Progress
from data.records import Place
from data.report import (
    describe,
    describe_counts,
    joined_summary,
    read_summary,
    require_all_accounted_for,
    split_summary,
)
from data.spool import (
    SPOOL_FILES,
    Spool,
    SpoolProgress,
    close_spool,
    open_spool,
    sample_sentences,
    split_documents,
    write_spool,
)
from data.token_file import PARTS, PROGRESS, Tokens, open_token_file, write_token_file
from data.tokenizer import RECIPE_VERSION, Tokenizer, load_tokenizer, train_tokenizer

FORMAT_VERSION = 2
_SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer learns from: about 200,000 lines
_TOKENIZER = "tokenizer.model"
_SPLITS = ("train", "validation")

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: what training and evaluation read."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    train: Tokens
    validation: Tokens
    fingerprint: str  # hex; equal if and only if tokenizer, tokens and splits are
    summary: dict[str, Any]  # see data/report.py
    weights: tuple[float, ...] = (1.0,)  # of the sources, the parts of train and of validation


@dataclass(frozen=True)
class _Source:
    """A source of the configuration, and the folders that belong to it."""

    key: str  # what its keys begin with: data, or data.sources[1]
    config: WeightedSource
    files: list[Path]
    fingerprint: str
    text: Path
    cache: Path

    def tokens(self, config: DataConfig, tokenizer: Tokenizer) -> Path:
        """The folder of its tokens."""
        parts = [self.fingerprint, config.validation_fraction, tokenizer.fingerprint]
        return self.cache / f"tokens-{_key(*parts)}"


def prepare_corpus(config: DataConfig, seq_length: int, local_rank: int) -> Corpus:
    """Opens the corpus of `config` from the cache; local rank 0 makes what is not there.

    Raises ValueError or FileNotFoundError where source, tokenizer or settings do not fit.
    """
    cache = Path(config.cache_directory).expanduser()
    if local_rank == 0 and cache.exists():
        remove_abandoned(cache)
    sources = [_find(key, source, cache) for key, source in config.mixture.items()]
    tokenizer = _tokenizer(config, sources, cache, local_rank)
    entries = [source.tokens(config, tokenizer) for source in sources]
    for source, entry in zip(sources, entries, strict=True):
        if local_rank != 0:
            wait_for_entry(entry)
        elif not is_whole(entry):
            with locked([source.text]):
                build_entry(entry, partial(_fill_tokens, source, config, tokenizer))
                shutil.rmtree(source.text, ignore_errors=True)
    corpus = _open(sources, entries)
    if local_rank == 0:
        where = f" and {len(entries) - 1} more" if entries[1:] else ""
        logger.info("corpus %s%s: %s", entries[0], where, describe(corpus.summary))
    for source, tokens in zip(sources, corpus.train.parts, strict=True):
        _require_a_row(source, config, tokens.num_tokens, seq_length)
    return corpus


def _find(key: str, config: WeightedSource, cache: Path) -> _Source:
    files = source_files(config, key)
    fingerprint = source_fingerprint(config, files, cache)
    return _Source(key, config, files, fingerprint, cache / f"text-{_key(fingerprint)}", cache)


def _key(*parts: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT_VERSION, *parts]).encode())


def _require_a_row(source: _Source, config: DataConfig, num_tokens: int, seq_length: int) -> None:
    is_stream = config.sequence_mode == "pack" and config.packing == "stream"
    if is_stream and num_tokens <= seq_length:
        raise ValueError(
            f"the {num_tokens} training tokens of {source.key}.source={source.config.source} do "
            f"not fill a row of model.seq_length={seq_length}; use more text, a smaller "
            "model.seq_length, or data.sequence_mode=pad"
        )


def _tokenizer(
    config: DataConfig, sources: list[_Source], cache: Path, local_rank: int
) -> Tokenizer:
    """The tokenizer that is given, or else one trained on the training text of all sources."""
    if config.tokenizer is not None:
        return _given_tokenizer(config, config.tokenizer)
    weighted = [[source.fingerprint, source.config.weight] for source in sources]
    recipe = [config.vocab_size, RECIPE_VERSION, _SAMPLE_BYTES, config.validation_fraction]
    # The weight of a single source means nothing.
    entry = cache / f"tokenizer-{_key(recipe, weighted if sources[1:] else weighted[0][0])}"
    if local_rank != 0:
        wait_for_entry(entry)
    elif not is_whole(entry):
        with locked([entry, *(source.text for source in sources)]):
            build_entry(entry, partial(_fill_tokenizer, config, sources))
        if len(sources) > 1:
            logger.info(
                "to change data.sources later without tokenizing all of them again, keep this "
                "tokenizer: data.tokenizer=%s",
                entry / _TOKENIZER,
            )
    return load_tokenizer(entry / _TOKENIZER, "the cached tokenizer")


def _given_tokenizer(config: DataConfig, path: str) -> Tokenizer:
    tokenizer = load_tokenizer(Path(path).expanduser())
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"data.tokenizer={path!r} has {tokenizer.vocab_size} pieces, more than "
            f"data.vocab_size={config.vocab_size}; set data.vocab_size={tokenizer.vocab_size} or "
            "more, or use a smaller tokenizer"
        )
    return tokenizer


def _fill_tokenizer(config: DataConfig, sources: list[_Source], work: Path) -> None:
    """Trains a tokenizer on lines of each source, in proportion to its weight."""
    sentences: list[str] = []
    total = sum(source.config.weight for source in sources)
    for source in sources:
        spool, _ = _spooled(source)
        train, _ = split_documents(spool.hashes, config.validation_fraction)
        share = round(_SAMPLE_BYTES * source.config.weight / total)
        sentences.extend(sample_sentences(spool, train, share))
        close_spool(spool)
    logger.info("training a tokenizer of data.vocab_size=%d pieces", config.vocab_size)
    write_durably(work / _TOKENIZER, train_tokenizer(sentences, config.vocab_size))
    write_header(work, [_TOKENIZER], {"format_version": FORMAT_VERSION})


def _spooled(source: _Source) -> tuple[Spool, SpoolProgress]:
    """The documents of a source, read now unless they have been; the caller holds its lock."""
    build_entry(source.text, partial(_fill_text, source))
    return open_spool(source.text), SpoolProgress.stored(read_header(source.text)["read"])


def _fill_text(source: _Source, work: Path) -> None:
    # Here, not at the top: importing `datasets` takes a second, and most starts need no reading.
    from data.sources import read_records  # noqa: PLC0415

    logger.info("preparing %s.source=%s: reading documents", source.key, source.config.source)
    scratch = work / "datasets"
    read = partial(read_records, source.config, source.key, source.files, scratch)
    # Bytes of all files before each; of a hub dataset nobody knows.
    before = list(accumulate((file.stat().st_size for file in source.files), initial=0))
    with Progress("reading", before[-1] if source.files else None) as progress:

        def told(place: Place, text_bytes: int) -> None:
            progress.reach(before[place.file] if source.files else text_bytes)

        done = write_spool(work, read, told)
    shutil.rmtree(scratch, ignore_errors=True)
    if not done.num_documents:
        raise ValueError(
            f"{source.key}.source={source.config.source} with {source.key}.path="
            f"{source.config.path!r} yields no documents; skipped: "
            f"{describe_counts(done.skipped) or 'nothing'}; give non-empty UTF-8 text"
        )
    write_header(work, list(SPOOL_FILES), {"read": vars(done)})


def _fill_tokens(source: _Source, config: DataConfig, tokenizer: Tokenizer, work: Path) -> None:
    """Writes token files, tokenizer and, last, the header."""
    started_at = time.perf_counter()
    spool, read = _spooled(source)
    splits = split_documents(spool.hashes, config.validation_fraction)
    if config.validation_fraction > 0 and not len(splits[1]):
        logger.warning(
            "%s.source has a single document, which is used for training; without held-out text "
            "(data.validation_fraction=%s) there is no evaluation: cut it into several documents",
            source.key,
            config.validation_fraction,
        )
    if config.tokenizer is not None and not tokenizer.is_lossless:
        logger.warning(
            "data.tokenizer=%r does not give every text back unchanged; bits per byte will count "
            "the bytes of the original text",
            config.tokenizer,
        )
    write_durably(work / _TOKENIZER, tokenizer.model)
    summary = read_summary(read, spool)
    for split, indices in zip(_SPLITS, splits, strict=True):
        write_token_file(work, split, spool, indices, tokenizer)
        summary[split] = split_summary(open_token_file(work, split, tokenizer.vocab_size))
    close_spool(spool)
    require_all_accounted_for(work, summary)
    names = [_TOKENIZER, *(f"{split}.{part}" for split in _SPLITS for part in PARTS)]
    digest = xxhash.xxh3_128(b"".join(file_digest(work / name) for name in names))
    facts = {"fingerprint": digest.hexdigest(), "format_version": FORMAT_VERSION}
    write_header(work, names, {**facts, "vocab_size": tokenizer.vocab_size, "summary": summary})
    for split in _SPLITS:
        (work / f"{split}.{PROGRESS}").unlink()
    logger.info("tokenized %s in %.1f s", source.key, time.perf_counter() - started_at)


def _open(sources: list[_Source], entries: list[Path]) -> Corpus:
    headers = [read_header(entry) for entry in entries]
    train, validation = (
        [
            open_token_file(entry, split, header["vocab_size"])
            for entry, header in zip(entries, headers, strict=True)
        ]
        for split in _SPLITS
    )
    fingerprints = [header["fingerprint"] for header in headers]
    is_one = len(entries) == 1
    return Corpus(
        tokenizer=load_tokenizer(entries[0] / _TOKENIZER, "the cached tokenizer"),
        tokenizer_path=entries[0] / _TOKENIZER,
        train=train[0] if is_one else JoinedTokens(train),
        validation=validation[0] if is_one else JoinedTokens(validation),
        fingerprint=fingerprints[0] if is_one else _key(*fingerprints),
        summary=joined_summary(
            {source.key: header["summary"] for source, header in zip(sources, headers, strict=True)}
        ),
        weights=tuple(source.config.weight for source in sources),
    )
