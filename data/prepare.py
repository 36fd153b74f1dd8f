"""From a source to a tokenized corpus in the cache, once.

[Note: cache]
`data.cache_directory` holds one folder per corpus, named by its key: a hash of the source's
content, the split and the tokenizer asked for. Local rank 0 of each host makes what its disk lacks;
the other ranks wait for the folder. A start that finds it only hashes the source's bytes.
"""

import json
import logging
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from configs.schema import DataConfig
from data.cache import build_entry, is_whole, read_header, wait_for_entry, write_header
from data.files import file_digest, source_files, source_fingerprint
from data.spool import Spool, remove_spool, sample_sentences, split_documents, spool_documents
from data.token_file import PARTS, TokenFile, open_token_file, write_durably, write_token_file
from data.tokenizer import RECIPE_VERSION, Tokenizer, load_tokenizer, train_tokenizer

FORMAT_VERSION = 1
_SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer learns from: about 200,000 lines
_TOKENIZER = "tokenizer.model"
_SPLITS = ("train", "validation")

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: what training and evaluation read."""

    tokenizer: Tokenizer
    tokenizer_path: Path
    train: TokenFile
    validation: TokenFile
    fingerprint: str  # hex; equal if and only if tokenizer, tokens and splits are
    summary: dict[str, Any]  # documents, bytes and tokens per split; skipped documents by reason


def prepare_corpus(config: DataConfig, seq_length: int, local_rank: int) -> Corpus:
    """Opens the corpus of `config` from the cache; local rank 0 makes it if it is not there.

    Raises ValueError or FileNotFoundError where source, tokenizer or settings do not fit.
    """
    files = source_files(config)
    given = _given_tokenizer(config)
    entry = Path(config.cache_directory).expanduser() / _cache_key(config, files, given)
    if local_rank != 0:
        wait_for_entry(entry)
    elif not is_whole(entry):
        if entry.exists():
            logger.warning("cache entry %s is damaged; making it again", entry)
        build_entry(entry, lambda work: _fill(config, files, given, work))
    corpus = _open_entry(entry)
    if local_rank == 0:
        logger.info("corpus %s: %s", entry, _describe(corpus.summary))
    num_tokens = len(corpus.train.tokens)
    if config.sequence_mode == "pack" and num_tokens <= seq_length:
        raise ValueError(
            f"the {num_tokens} training tokens of data.source={config.source} do not fill a row of "
            f"model.seq_length={seq_length}; use more text, a smaller model.seq_length, or "
            "data.sequence_mode=pad"
        )
    return corpus


def _given_tokenizer(config: DataConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    tokenizer = load_tokenizer(Path(config.tokenizer).expanduser())
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} has {tokenizer.vocab_size} pieces, more than "
            f"data.vocab_size={config.vocab_size}; set data.vocab_size={tokenizer.vocab_size} or "
            "more, or use a smaller tokenizer"
        )
    return tokenizer


def _cache_key(config: DataConfig, files: list[Path], given: Tokenizer | None) -> str:
    tokenizer: list[str | int]
    if given is None:
        tokenizer = ["trained", config.vocab_size, RECIPE_VERSION, _SAMPLE_BYTES]
    else:
        tokenizer = ["given", given.fingerprint]
    source = source_fingerprint(config, files)
    parts = [FORMAT_VERSION, source, config.validation_fraction, *tokenizer]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _fill(config: DataConfig, files: list[Path], given: Tokenizer | None, work: Path) -> None:
    """Reads the source and writes tokenizer, token files and, last, the header."""
    started_at = time.perf_counter()
    logger.info("preparing data.source=%s: reading documents", config.source)
    skipped: Counter[str] = Counter()
    spool = _read_source(config, files, work, skipped)
    splits = split_documents(spool.hashes, config.validation_fraction)
    if config.validation_fraction > 0 and not len(splits[1]):
        logger.warning(
            "the source has a single document, which is used for training; without held-out text "
            "(data.validation_fraction=%s) there is no evaluation: cut it into several documents",
            config.validation_fraction,
        )
    tokenizer = given
    if tokenizer is None:
        logger.info("training a tokenizer of data.vocab_size=%d pieces", config.vocab_size)
        sentences = list(sample_sentences(spool, splits[0], _SAMPLE_BYTES))
        tokenizer = Tokenizer(train_tokenizer(sentences, config.vocab_size), _TOKENIZER)
    elif not tokenizer.is_lossless:
        logger.warning(
            "data.tokenizer=%r does not give every text back unchanged; bits per byte will count "
            "the bytes of the original text",
            config.tokenizer,
        )
    write_durably(work / _TOKENIZER, tokenizer.model)
    summary: dict[str, Any] = {"skipped": dict(skipped)}
    for split, indices in zip(_SPLITS, splits, strict=True):
        num_tokens = write_token_file(work, split, spool, indices, tokenizer)
        summary[split] = {
            "documents": len(indices),
            "bytes": int(spool.num_bytes(indices).sum()),
            "tokens": num_tokens,
        }
    remove_spool(spool, work / "spool")
    names = [_TOKENIZER, *(f"{split}.{part}" for split in _SPLITS for part in PARTS)]
    digest = xxhash.xxh3_128(b"".join(file_digest(work / name) for name in names))
    facts = {"fingerprint": digest.hexdigest(), "format_version": FORMAT_VERSION}
    write_header(work, names, {**facts, "vocab_size": tokenizer.vocab_size, "summary": summary})
    logger.info("prepared the corpus in %.1f s", time.perf_counter() - started_at)


def _read_source(config: DataConfig, files: list[Path], work: Path, skipped: Counter[str]) -> Spool:
    # Here, not at the top: importing `datasets` takes a second, and most starts need no reading.
    from data.sources import read_documents  # noqa: PLC0415

    scratch = work / "datasets"
    spool = spool_documents(
        read_documents(config, files, scratch, skipped), work / "spool", skipped
    )
    shutil.rmtree(scratch, ignore_errors=True)
    if not len(spool):
        raise ValueError(
            f"data.source={config.source} with data.path={config.path!r} yields no documents; "
            f"skipped: {_describe_counts(skipped) or 'nothing'}; give non-empty UTF-8 text"
        )
    return spool


def _open_entry(entry: Path) -> Corpus:
    header = read_header(entry)
    train, validation = (open_token_file(entry, split, header["vocab_size"]) for split in _SPLITS)
    return Corpus(
        tokenizer=load_tokenizer(entry / _TOKENIZER, "the cached tokenizer"),
        tokenizer_path=entry / _TOKENIZER,
        train=train,
        validation=validation,
        fingerprint=header["fingerprint"],
        summary=header["summary"],
    )


def _describe(summary: dict[str, Any]) -> str:
    parts = [
        f"{split} {summary[split]['documents']:,} documents, {summary[split]['bytes']:,} bytes, "
        f"{summary[split]['tokens']:,} tokens"
        for split in _SPLITS
    ]
    if summary["skipped"]:
        parts.append(f"skipped {_describe_counts(summary['skipped'])}")
    return "; ".join(parts)


def _describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
