"""The tokenized corpus of a run: opened from the cache, and made there first if it is missing.

Training reads two kinds of folders in `data.cache_directory`:

    tokens-...  a source with one split, tokenized by one tokenizer
    corpus-...  which of them belong together, and what is known about them

Their names are hashes of everything that decides their content. `python -m data.corpus` makes them
from text, in a process of its own, so that training knows nothing of text; data/corpus/build.py
tells how.
"""

import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from configs.errors import UserError
from configs.launch import EXIT_BEFORE_TRAINING
from configs.schema import DataConfig, WeightedSource
from data import cache
from data.source_files import SourceKeys, source_files, source_fingerprint
from data.token_file import JoinedTokens, Tokens, open_token_file
from data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 3  # of the cache
RECIPE_VERSION = 1  # of data/corpus/tokenizer_training.py, whose changes give other tokenizers
SAMPLE_BYTES = 8_000_000  # of training text that a tokenizer learns from: about 200,000 lines
SPLITS = ("train", "validation")
_POLL_INTERVAL_S = 0.2

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


class FoundSource(NamedTuple):
    """A source of the configuration, its files, and a fingerprint of its content."""

    keys: SourceKeys
    config: WeightedSource
    files: list[Path]
    fingerprint: str


class FoundText(NamedTuple):
    """The sources to train on, and the held-out sources that are given."""

    sources: list[FoundSource]
    held_out: list[FoundSource]

    @property
    def fingerprint(self) -> str:
        """A hash of the content of all sources, in hex."""
        hashes = [found.fingerprint for found in self.sources]
        if self.held_out:
            hashes += ["held out:", *(found.fingerprint for found in self.held_out)]
        return join_hashes(hashes)


def prepare_corpus(
    config: DataConfig, seq_length: int, local_rank: int, text: FoundText | None = None
) -> Corpus:
    """Open the corpus of `config`; local rank 0 of each host has it made if its disk lacks it.

    Ranks that must not see different versions of the text pass what they have compared. Raise
    UserError if source, tokenizer or settings do not fit together.
    """
    tokenizer = given_tokenizer(config)
    entry = corpus_entry(config, text or find_text(config), tokenizer)
    folders = _tokens(entry)
    if folders is None and local_rank == 0:
        _make(config)
        folders = _tokens(entry)
        if folders is None:
            raise UserError("the text has changed while it was read; start again")
    while folders is None:  # if the text cannot be prepared, the launcher ends this rank
        time.sleep(_POLL_INTERVAL_S)
        folders = _tokens(entry)
    corpus = _open(config, entry, folders, tokenizer)
    if local_rank == 0:
        about = cache.read_header(entry)
        logger.info("corpus %s: %s", entry, "\n  ".join(about["description"]))
        for warning in about["warnings"]:
            logger.warning("%s", warning)
    _check_rows(config, corpus, seq_length)
    return corpus


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """Load `data.tokenizer`; None if one is to be trained."""
    if config.tokenizer is None:
        return None
    path = Path(config.tokenizer).expanduser()
    return load_tokenizer(path, bos_token=config.bos_token, eos_token=config.eos_token)


def find_text(config: DataConfig) -> FoundText:
    """Return the sources with fingerprints of their content, which is not read as text."""
    folder = cache_directory(config)

    def find(keys: SourceKeys, source: WeightedSource) -> FoundSource:
        files = source_files(source, keys)
        return FoundSource(keys, source, files, source_fingerprint(source, files, folder))

    sources, held_out = [], []
    for key, source in config.mixture.items():
        sources.append(find(SourceKeys(f"{key}.", f"{key}.path"), source))
        if source.validation_path is not None:
            given = replace(source, path=source.validation_path, hub_revision=None)
            held_out.append(find(SourceKeys(f"{key}.", f"{key}.validation_path"), given))
    return FoundText(sources, held_out)


def corpus_entry(config: DataConfig, text: FoundText, tokenizer: Tokenizer | None) -> Path:
    """Return the folder of a corpus, named by all that decides its content."""
    by: list[object] = [config.validation_fraction]
    if tokenizer is not None:
        by.append(tokenizer.fingerprint)
    else:
        by += [RECIPE_VERSION, SAMPLE_BYTES, config.padded_vocab_size]
        by += [source.config.weight for source in text.sources if text.sources[1:]]
    name = key_of(text.fingerprint, by)
    return cache_directory(config) / f"corpus-{name}"


def cache_directory(config: DataConfig) -> Path:
    """Return the folder of all entries."""
    return Path(config.cache_directory).expanduser()


def key_of(*parts: object) -> str:
    """Return the part of an entry's name that stands for its content."""
    return xxh3_128_hexdigest(json.dumps([FORMAT_VERSION, *parts]).encode())


def join_hashes(hashes: list[str]) -> str:
    """Return the hash of hashes in hex."""
    return xxh3_128_hexdigest(" ".join(hashes).encode())


def _tokens(entry: Path) -> list[Path] | None:
    """Return the folders of tokens of a corpus, or None if one of them is not complete."""
    if not cache.is_complete(entry):
        return None
    folders = [entry.with_name(name) for name in cache.read_header(entry)["tokens"]]
    return folders if all(map(cache.is_complete, folders)) else None


def _make(config: DataConfig) -> None:
    """Have data/corpus/__main__.py prepare the text; it ends when we do, which closes its stdin."""
    root = str(Path(__file__).parent.parent)
    # With -P a folder `data` where the user runs this is not taken for ours.
    code = f"import sys; sys.path.insert(0, {root!r}); from data.corpus.__main__ import main"
    command = [sys.executable, "-P", "-c", f"{code}; sys.exit(main())"]
    pipe = subprocess.PIPE
    try:  # in a process group of its own, so that Ctrl-C only reaches us
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, process_group=0)
    except OSError as error:
        raise UserError(f"cannot start a process to prepare the text: {error.strerror}") from error
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    task = {"log_level": logger.getEffectiveLevel(), "data": asdict(config)}
    with process:
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.flush()
            message = process.stdout.read()  # to its end
            process.wait()
        except BaseException:
            process.kill()
            raise
    if process.returncode == EXIT_BEFORE_TRAINING and message:
        raise UserError(json.loads(message.splitlines()[-1]))
    if process.returncode < 0:
        number = signal.Signals(-process.returncode)
        hint = "; is there enough memory?" if number in (signal.SIGKILL, signal.SIGABRT) else ""
        raise UserError(f"the process that prepares the text was ended by {number.name}{hint}")
    if process.returncode:
        raise RuntimeError("the preparation of text has failed: its error is above")


def _open(config: DataConfig, entry: Path, folders: list[Path], given: Tokenizer | None) -> Corpus:
    about = cache.read_header(entry)
    path = folders[0] / about["tokenizer"]
    tokenizer = given or load_tokenizer(path, "the cached tokenizer")
    train, validation = (
        [open_token_file(folder, split, tokenizer.vocab_size) for folder in folders]
        for split in SPLITS
    )
    sources = list(config.mixture.values())
    held_out = [source.weight for source in sources if source.validation_path is not None]
    train = train[: len(sources)]
    if held_out:  # the held-out documents of the sources are among those given
        validation = validation[len(sources) :]
    return Corpus(
        tokenizer=tokenizer,
        tokenizer_path=path,
        train=JoinedTokens(train) if train[1:] else train[0],
        validation=JoinedTokens(validation) if validation[1:] else validation[0],
        fingerprint=about["fingerprint"],
        summary=about["summary"],
        weights=tuple(source.weight for source in sources),
        text_fingerprint=about["text_fingerprint"],
        validation_weights=tuple(held_out) or None,
    )


def _check_rows(config: DataConfig, corpus: Corpus, seq_length: int) -> None:
    """Raise UserError if a source does not fill a row, naming the longest row that all fill."""
    if config.sequence_mode != "pack" or config.packing == "best_fit":
        return
    num_tokens = [tokens.num_tokens for tokens in corpus.train.parts]
    fewest = min(num_tokens)
    section, source = list(config.mixture.items())[num_tokens.index(fewest)]
    if fewest <= seq_length:
        raise UserError(
            f"the {fewest} training tokens of {section}.source={source.source} do not fill a row "
            f"of model.seq_length={seq_length}; use more text, model.seq_length={fewest - 1} or "
            "less, or data.sequence_mode=pad"
        )


def unknown_warning(unknown: int, total: int, what: str) -> str:
    """Say how many tokens are unknown, and why it matters."""
    return (
        f"{unknown:,} of {total:,} {what} ({unknown / total:.1%}) are unknown to the tokenizer: "
        "bits per byte counts the text behind them as predicted, and is too low; use a tokenizer "
        "with byte fallback (data.tokenizer=null trains one)"
    )


def lossy_warning(split: dict[str, Any], what: str) -> str:
    """Say how many documents the tokenizer does not reproduce."""
    return (
        f"{split['lossy']:,} of {split['compared']:,} {what} that were compared decode to another "
        "text; bits per byte counts the bytes of the original"
    )
