"""From sources to a tokenized corpus in the cache, once.

[Note: cache]
`data.cache_directory` holds folders named by a hash of all that decides what is in them:

    text-...       the text of a source as documents, until it has been tokenized
    documents-...  hashes and sizes of the documents of a source, by which they are held out
    tokenizer-...  a tokenizer, by the text that it is trained on
    tokens-...     one source split in one way and tokenized by one tokenizer

Local rank 0 of each host makes what its disk lacks; the other ranks wait for the folders. A source
that is in several mixtures with the same tokenizer is tokenized once, unless other sources make an
exception to what is held out of it (data/corpus/split.py). A start that finds
everything looks at the source's files and reads only those that it has not seen before.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import UserError
from configs.schema import DataConfig, WeightedSource
from data.corpus.build import (
    FORMAT_VERSION,
    SAMPLE_BYTES,
    SPLITS,
    TOKENIZER,
    Source,
    fill_documents,
    fill_tokenizer,
    fill_tokens,
)
from data.corpus.cache import (
    TEXT,
    build_entry,
    is_whole,
    read_header,
    remove_abandoned,
    wait_for_entry,
)
from data.corpus.durable import locked
from data.corpus.files import SourceKeys, source_files, source_fingerprint
from data.corpus.report import all_warnings, describe, joined_summary
from data.corpus.split import HELD_OUT, Split, read_documents, split_by_given, split_by_hash
from data.token_file import JoinedTokens, Tokens, open_token_file
from data.tokenizer import RECIPE_VERSION, Tokenizer, load_tokenizer

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: what training and evaluation read."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    train: Tokens
    validation: Tokens
    fingerprint: str  # hex; equal if and only if tokenizer, tokens and splits are
    summary: dict[str, Any]  # see data/corpus/report.py
    weights: tuple[float, ...] = (1.0,)  # of the sources, the parts of train and of validation
    text_fingerprint: str = ""  # hex, of what the sources hold
    validation_weights: tuple[float, ...] | None = None  # if held-out text is given: of its parts

    @property
    def identity(self) -> str:
        """What tells this corpus and its tokenizer from all others."""
        return f"{self.fingerprint} {self.tokenizer.fingerprint}"


def prepare_corpus(config: DataConfig, seq_length: int, local_rank: int) -> Corpus:
    """Opens the corpus of `config` from the cache; local rank 0 makes what is not there.

    Raises UserError where source, tokenizer or settings do not fit.
    """
    cache = Path(config.cache_directory).expanduser()
    is_maker = local_rank == 0
    if is_maker and cache.exists():
        remove_abandoned(cache)
    sources, held_out = _find_sources(config)
    for source in (*sources, *held_out):
        _make(source.documents, [source], partial(fill_documents, source), is_maker)
    splits = _splits(config, sources, held_out)
    tokenizer = _tokenizer(config, sources, splits, is_maker)
    entries = []
    for source, split in zip((*sources, *held_out), splits, strict=True):
        parts = (source.fingerprint, config.validation_fraction, tokenizer.fingerprint)
        entries.append(cache / f"tokens-{_key(*parts, _digest(split))}")
        fill = partial(fill_tokens, source, split, config, tokenizer)
        _make(entries[-1], [source], fill, is_maker)
    if is_maker:
        _remove_texts([*sources, *held_out])
    corpus = _open(sources, held_out, entries)
    if is_maker:
        where = f" and {len(entries) - 1} more" if entries[1:] else ""
        logger.info("corpus %s%s: %s", entries[0], where, describe(corpus.summary))
        is_evaluated = bool(held_out) or config.validation_fraction > 0
        for warning in all_warnings(corpus.summary, is_evaluated=is_evaluated):
            logger.warning("%s", warning)
    _require_rows(sources, config, corpus, seq_length)
    return corpus


def _make(entry: Path, sources: list[Source], fill: Callable[[Path], None], is_maker: bool) -> None:
    """Returns when the entry is there; `fill` may read the texts of sources."""
    if not is_maker:
        wait_for_entry(entry)
    elif not is_whole(entry):
        with locked([entry, *(source.text for source in sources)]):
            build_entry(entry, fill)


def _remove_texts(sources: list[Source]) -> None:
    """Removes the texts of sources, which are of no use once they have been tokenized."""
    for source in sources:
        if source.text.exists():
            with locked([source.text]):
                shutil.rmtree(source.text, ignore_errors=True)


def text_fingerprint(config: DataConfig) -> str:
    """Returns a hash of what the sources hold, before anything of it is read as text."""
    return _joined_sources(*_find_sources(config))


def _joined_sources(sources: list[Source], held_out: list[Source]) -> str:
    names = [source.fingerprint for source in sources]
    given = ["held out:", *(source.fingerprint for source in held_out)] if held_out else []
    return _joined([*names, *given])


def _find_sources(config: DataConfig) -> tuple[list[Source], list[Source]]:
    """The sources to train on, and those that are given to be held out."""
    sources, held_out = [], []
    for key, source in config.mixture.items():
        sources.append(_find(SourceKeys(key, f"{key}.path"), source, config.cache_directory))
        if source.validation_path is not None:
            given = replace(source, path=source.validation_path, hub_revision=None)
            keys = SourceKeys(key, f"{key}.validation_path")
            held_out.append(_find(keys, given, config.cache_directory))
    return sources, held_out


def _find(keys: SourceKeys, config: WeightedSource, cache_directory: str) -> Source:
    cache = Path(cache_directory).expanduser()
    files = source_files(config, keys)
    fingerprint = source_fingerprint(config, files, cache)
    name = _key(fingerprint)
    return Source(
        keys, config, files, fingerprint, cache / f"{TEXT}{name}", cache / f"documents-{name}"
    )


def _splits(config: DataConfig, sources: list[Source], held_out: list[Source]) -> list[Split]:
    """The splits of all sources, those to train on first."""
    documents = [read_documents(source.documents) for source in sources]
    if not held_out:
        return split_by_hash(documents, config.validation_fraction)
    given = [read_documents(source.documents) for source in held_out]
    splits = split_by_given(documents, given)
    for source, split in zip(sources, splits, strict=True):
        if (split == HELD_OUT).all():
            raise UserError(
                f"every document of {source.keys.path}={source.config.path!r} is held out by "
                "validation_path, so there is nothing to train on; give other text in one of them"
            )
    return [*splits, *split_by_given(given, given)]


def _digest(split: Split) -> str:
    return xxhash.xxh3_128_hexdigest(split.tobytes())


def _key(*parts: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT_VERSION, *parts]).encode())


def _require_rows(
    sources: list[Source], config: DataConfig, corpus: Corpus, seq_length: int
) -> None:
    """Raises UserError if a source does not fill a row, naming the longest row that all fill."""
    if config.sequence_mode != "pack" or config.packing != "stream":
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


def _tokenizer(
    config: DataConfig, sources: list[Source], splits: list[Split], is_maker: bool
) -> Tokenizer:
    """The tokenizer that is given, or else one trained on the training text of all sources."""
    if config.tokenizer is not None:
        return _given_tokenizer(config, config.tokenizer)
    is_one = len(sources) == 1  # then its weight means nothing
    parts = [
        [source.fingerprint, _digest(split), None if is_one else source.config.weight]
        for source, split in zip(sources, splits, strict=False)
    ]
    recipe = [config.vocab_size, RECIPE_VERSION, SAMPLE_BYTES, config.validation_fraction]
    entry = Path(config.cache_directory).expanduser() / f"tokenizer-{_key(recipe, parts)}"
    if is_maker and not is_one and not entry.exists():
        logger.info(
            "to change data.sources later without tokenizing all of them again, keep this "
            "tokenizer: data.tokenizer=%s",
            entry / TOKENIZER,
        )
    _make(entry, sources, partial(fill_tokenizer, config, sources, splits), is_maker)
    return load_tokenizer(entry / TOKENIZER, "the cached tokenizer")


def _given_tokenizer(config: DataConfig, path: str) -> Tokenizer:
    tokenizer = load_tokenizer(Path(path).expanduser())
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"data.tokenizer={path!r} has {tokenizer.vocab_size} pieces, more than "
            f"data.vocab_size={config.vocab_size}; set data.vocab_size={tokenizer.vocab_size} or "
            "more, or use a smaller tokenizer"
        )
    return tokenizer


def _joined(fingerprints: list[str]) -> str:
    return xxhash.xxh3_128_hexdigest(" ".join(fingerprints).encode())


def _open(sources: list[Source], held_out: list[Source], entries: list[Path]) -> Corpus:
    headers = [read_header(entry) for entry in entries]
    train, validation = (
        [
            open_token_file(entry, split, header["vocab_size"])
            for entry, header in zip(entries, headers, strict=True)
        ]
        for split in SPLITS
    )
    train = train[: len(sources)]
    fingerprints = [header["fingerprint"] for header in headers]
    summaries = {
        source.keys: header["summary"]
        for source, header in zip([*sources, *held_out], headers, strict=True)
    }
    summary = joined_summary({source.keys.section: summaries[source.keys] for source in sources})
    validation_weights = None
    if held_out:
        validation = validation[len(sources) :]
        given = {source.keys.section: summaries[source.keys] for source in held_out}
        validation_weights = tuple(source.config.weight for source in held_out)
        # Documents of the sources that are held out are among those given.
        summary = {
            **summary,
            "excluded": summary["validation"]["documents"],
            "validation": joined_summary(given)["validation"],
        }
    return Corpus(
        tokenizer=load_tokenizer(entries[0] / TOKENIZER, "the cached tokenizer"),
        tokenizer_path=entries[0] / TOKENIZER,
        train=train[0] if len(train) == 1 else JoinedTokens(train),
        validation=validation[0] if len(validation) == 1 else JoinedTokens(validation),
        fingerprint=fingerprints[0] if len(entries) == 1 else _joined(fingerprints),
        summary=summary,
        weights=tuple(source.config.weight for source in sources),
        text_fingerprint=_joined_sources(sources, held_out),
        validation_weights=validation_weights,
    )
