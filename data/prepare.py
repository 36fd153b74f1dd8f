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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import UserError
from configs.schema import DataConfig, WeightedSource
from data.cache import (
    TEXT,
    build_entry,
    is_whole,
    read_header,
    remove_abandoned,
    wait_for_entry,
)
from data.files import source_files, source_fingerprint
from data.locks import locked
from data.making import (
    FORMAT_VERSION,
    SAMPLE_BYTES,
    SPLITS,
    TOKENIZER,
    Source,
    fill_tokenizer,
    fill_tokens,
)
from data.mixture import JoinedTokens
from data.report import describe, joined_summary
from data.token_file import Tokens, open_token_file
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
    summary: dict[str, Any]  # see data/report.py
    weights: tuple[float, ...] = (1.0,)  # of the sources, the parts of train and of validation
    text_fingerprint: str = ""  # hex, of what the sources hold

    @property
    def identity(self) -> str:
        """What tells this corpus and its tokenizer from all others."""
        return f"{self.fingerprint} {self.tokenizer.fingerprint}"


def prepare_corpus(config: DataConfig, seq_length: int, local_rank: int) -> Corpus:
    """Opens the corpus of `config` from the cache; local rank 0 makes what is not there.

    Raises UserError where source, tokenizer or settings do not fit.
    """
    cache = Path(config.cache_directory).expanduser()
    if local_rank == 0 and cache.exists():
        remove_abandoned(cache)
    sources = _find_sources(config)
    tokenizer = _tokenizer(config, sources, cache, local_rank)
    encoded_by = (config.validation_fraction, tokenizer.fingerprint)
    entries = [cache / f"tokens-{_key(source.fingerprint, *encoded_by)}" for source in sources]
    for source, entry in zip(sources, entries, strict=True):
        if local_rank != 0:
            wait_for_entry(entry)
        elif not is_whole(entry):
            with locked([source.text]):
                build_entry(entry, partial(fill_tokens, source, config, tokenizer))
    if local_rank == 0:
        _remove_texts(sources)
    corpus = _open(sources, entries)
    if local_rank == 0:
        where = f" and {len(entries) - 1} more" if entries[1:] else ""
        logger.info("corpus %s%s: %s", entries[0], where, describe(corpus.summary))
    _require_rows(sources, config, corpus, seq_length)
    return corpus


def _remove_texts(sources: list[Source]) -> None:
    """Removes the texts of sources, which are of no use once they have been tokenized."""
    for source in sources:
        if source.text.exists():
            with locked([source.text]):
                shutil.rmtree(source.text, ignore_errors=True)


def text_fingerprint(config: DataConfig) -> str:
    """Returns a hash of what the sources hold, before anything of it is read as text."""
    return _joined([source.fingerprint for source in _find_sources(config)])


def _find_sources(config: DataConfig) -> list[Source]:
    cache = Path(config.cache_directory).expanduser()
    return [_find(key, source, cache) for key, source in config.mixture.items()]


def _find(key: str, config: WeightedSource, cache: Path) -> Source:
    files = source_files(config, key)
    fingerprint = source_fingerprint(config, files, cache)
    return Source(key, config, files, fingerprint, cache / f"{TEXT}{_key(fingerprint)}")


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
            f"the {fewest} training tokens of {source.key}.source={source.config.source} do "
            f"not fill a row of model.seq_length={seq_length}; use more text, model.seq_length="
            f"{fewest - 1} or less, or data.sequence_mode=pad"
        )


def _tokenizer(
    config: DataConfig, sources: list[Source], cache: Path, local_rank: int
) -> Tokenizer:
    """The tokenizer that is given, or else one trained on the training text of all sources."""
    if config.tokenizer is not None:
        return _given_tokenizer(config, config.tokenizer)
    weighted = [[source.fingerprint, source.config.weight] for source in sources]
    recipe = [config.vocab_size, RECIPE_VERSION, SAMPLE_BYTES, config.validation_fraction]
    # The weight of a single source means nothing.
    entry = cache / f"tokenizer-{_key(recipe, weighted if sources[1:] else weighted[0][0])}"
    if local_rank != 0:
        wait_for_entry(entry)
    elif not is_whole(entry):
        with locked([entry, *(source.text for source in sources)]):
            build_entry(entry, partial(fill_tokenizer, config, sources))
        if len(sources) > 1:
            logger.info(
                "to change data.sources later without tokenizing all of them again, keep this "
                "tokenizer: data.tokenizer=%s",
                entry / TOKENIZER,
            )
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


def _open(sources: list[Source], entries: list[Path]) -> Corpus:
    headers = [read_header(entry) for entry in entries]
    train, validation = (
        [
            open_token_file(entry, split, header["vocab_size"])
            for entry, header in zip(entries, headers, strict=True)
        ]
        for split in SPLITS
    )
    fingerprints = [header["fingerprint"] for header in headers]
    is_one = len(entries) == 1
    return Corpus(
        tokenizer=load_tokenizer(entries[0] / TOKENIZER, "the cached tokenizer"),
        tokenizer_path=entries[0] / TOKENIZER,
        train=train[0] if is_one else JoinedTokens(train),
        validation=validation[0] if is_one else JoinedTokens(validation),
        fingerprint=fingerprints[0] if is_one else _joined(fingerprints),
        summary=joined_summary(
            {source.key: header["summary"] for source, header in zip(sources, headers, strict=True)}
        ),
        weights=tuple(source.config.weight for source in sources),
        text_fingerprint=_joined([source.fingerprint for source in sources]),
    )
