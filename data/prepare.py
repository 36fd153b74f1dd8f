"""Tokenize ahead of training: `python -m data.prepare config=NAME.yaml section.key=value ...`.

Needs neither torch nor ranks. Runs the code of a training start, in several processes.
"""

import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from configs import (
    Config,
    DataConfig,
    Range,
    UserError,
    exit_on_config_error,
    exit_with_error,
    load_config,
    machine_errors_as_user_errors,
)
from configs.errors import bad_setting, os_error_text
from configs.launch import usable_cores
from configs.program_settings import split_settings
from configs.tokenizer_files import resolve_tokenizer
from configs.validate import check_inputs
from data.cache import sync_directory, sync_files
from data.cached_corpus import Corpus, prepare_corpus
from data.corpus.build import build_corpus
from data.corpus.megatron import DTYPES, HEADER, MAGIC
from data.corpus.report import count_in_words
from data.token_file import TokenFile
from data.tokenizer import Tokenizer

_CORES_PER_PROCESS = 4  # more threads of one process would wait for each other
_INTERRUPTED = 130  # exit code of shells for Ctrl-C
_UINT16, _INT32 = 8, 4  # codes of dtypes in Megatron's format
_MAX_UINT16_VOCABULARY = 65_500  # beyond, Megatron-LM writes int32

logger = logging.getLogger("microtron")


@dataclass(frozen=True)
class Settings:
    """Tokenize the text of a configuration into data.cache_directory, without torch or ranks.

    All settings of train.py are accepted, config=NAME.yaml included; see python train.py --help. A
    start of training with the same data.* then finds the tokens. Several hosts with one cache
    directory can share the work, and an interrupted command can be repeated: see docs/data.md.
    """

    # i/n, such as 2/8: begin with the i-th of n equal parts, so that n commands share the work.
    # Each also does what no other one is doing.
    shard: str = "1/1"
    processes: int | None = None  # of this command; null: one for every four cores
    # Also write the tokens in Megatron's format: OUTPUT.bin, OUTPUT.idx and, of the held-out
    # documents, OUTPUT_validation.bin and .idx. Of a mixture, OUTPUT_0, OUTPUT_1 and so on.
    output: str | None = None

    RANGES: ClassVar = {"processes": Range(1)}

    def __post_init__(self) -> None:
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", self.shard)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            problem = "is not one of n parts; write i/n with i from 1 to n, such as shard=1/4"
            raise bad_setting("shard", self.shard, problem)

    @property
    def num_processes(self) -> int:
        """The number of processes of this command."""
        return self.processes or -(-usable_cores() // _CORES_PER_PROCESS)

    def firsts(self) -> list[float]:
        """Return where each process begins, as a fraction of the work."""
        (i, n), m = map(int, self.shard.split("/")), self.num_processes
        return [(i - 1 + number / m) / n for number in range(m)]


def parse(arguments: list[str]) -> tuple[Config, Settings]:
    """Return the checked configuration and the settings of this program, or exit."""
    settings, others = split_settings(Settings, arguments)
    config = load_config(others, lambda config: config.parallel.smallest_world_size)
    with exit_on_config_error():
        if settings.output is not None and config.data.has_partial_targets:
            problem = "would lose which tokens are targets, for Megatron's files have only tokens"
            fix = "leave output out, or use data.format=text"
            raise bad_setting("output", settings.output, f"{problem}; {fix}")
        check_inputs(config)
        config = resolve_tokenizer(config)
    return config, settings


def outputs(config: DataConfig, output: str) -> Iterator[tuple[Path, str]]:
    """Yield the prefix and the split of each dataset to write, in the order of the sources."""
    prefix = Path(os.path.abspath(os.path.expanduser(output)))
    for split, ending in (("train", ""), ("validation", "_validation")):
        sources = list(config.mixture.values())
        numbers = list(range(len(sources)))
        if split == "validation":
            numbers = [i for i in numbers if sources[i].validation_path is not None] or numbers
        for number in numbers:
            source = f"_{number}" if len(sources) > 1 else ""
            yield prefix.with_name(f"{prefix.name}{source}{ending}"), split


def dataset_files(prefix: Path) -> tuple[Path, Path]:
    """Return the .bin and the .idx of a prefix."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def require_new(prefix: Path) -> None:
    """Make the folder of a prefix; raise UserError if that fails or one of its files exists."""
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot make its parent directory: {os_error_text(error)}"
        raise UserError(f"output={prefix}: {problem}") from error
    for file in dataset_files(prefix):
        if file.exists():
            raise already_exists(prefix, file)


def already_exists(prefix: Path, file: Path) -> UserError:
    """Return the error for a file that would be overwritten."""
    return UserError(f"output={prefix}: {file} already exists; choose another output")


def write_dataset(prefix: Path, tokens: TokenFile, tokenizer: Tokenizer) -> None:
    """Write documents as PREFIX.bin and PREFIX.idx, each complete or absent, the index last.

    A document is bos, its text, eos; without bos where the two are the same token.
    """
    code = _UINT16 if tokenizer.vocab_size < _MAX_UINT16_VOCABULARY else _INT32
    dtype, skipped = np.dtype(DTYPES[code]), int(tokenizer.bos_id == tokenizer.eos_id)
    offsets = tokens.document_offsets
    lengths = np.diff(offsets) - skipped
    header = np.array([(MAGIC, 1, code, len(lengths), len(lengths) + 1)], HEADER)
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    index = (header, lengths.astype("<i4"), pointers, np.arange(len(lengths) + 1, dtype="<i8"))
    files = dataset_files(prefix)
    # Another process, perhaps on another host, may be writing the same output.
    ending = f"{uuid.uuid4().hex}.partial"
    partial_files = [file.with_name(f"{file.name}.{ending}") for file in files]
    try:
        with partial_files[0].open("xb") as data, partial_files[1].open("xb") as idx:
            for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                data.write(tokens.span(start + skipped, end).astype(dtype).tobytes())
            for part in index:
                idx.write(part.tobytes())
            sync_files([data, idx])
        require_new(prefix)
        for partial_file, file in zip(partial_files, files, strict=True):
            os.link(partial_file, file)  # a rename would overwrite
    except FileExistsError as error:
        raise already_exists(prefix, error.filename2) from error
    finally:
        for partial_file in partial_files:
            partial_file.unlink(missing_ok=True)
    sync_directory(prefix.parent)


def write_outputs(config: DataConfig, corpus: Corpus, output: str) -> None:
    """Write a corpus as datasets of Megatron."""
    parts = (*corpus.train.parts, *corpus.validation.parts)
    for (prefix, split), tokens in zip(outputs(config, output), parts, strict=True):
        if tokens.num_documents:
            write_dataset(prefix, tokens, corpus.tokenizer)
            documents = count_in_words(tokens.num_documents, "document")
            logger.info("wrote %s.bin and .idx: %s (%s)", prefix, documents, split)


def prepare_together(config: DataConfig, firsts: list[float]) -> int:
    """Build the corpus in this process and others, each with its share of the cores.

    Return how many tokens were not there before.
    """
    context, n = multiprocessing.get_context("spawn"), len(firsts)
    helpers = [
        context.Process(target=_help, args=(config, firsts[number], number, n), daemon=True)
        for number in range(1, n)
    ]
    for helper in helpers:
        helper.start()
    _use_share_of_cores(0, n)
    num_new = build_corpus(config, firsts[0])
    for helper in helpers:
        helper.join()
    return num_new


def _help(config: DataConfig, first: float, number: int, num_processes: int) -> None:
    """Share the work of the main process, which meets the same errors and reports them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use_share_of_cores(number, num_processes)
    logger.setLevel(logging.CRITICAL)
    try:
        build_corpus(config, first)
    except (UserError, OSError):
        sys.exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child"
    parent.join()
    os._exit(1)


def _use_share_of_cores(number: int, num_processes: int) -> None:
    """Restrict this process, and so its threads, to one of equal shares of the cores."""
    if num_processes > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number % len(cores) :: num_processes])


def main(config: Config, settings: Settings) -> int:
    """Fill the cache, write the output, and report."""
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)
    started_at, cache = time.perf_counter(), config.data.cache_directory
    try:
        if settings.output is not None:
            for prefix, _ in outputs(config.data, settings.output):
                require_new(prefix)
        with machine_errors_as_user_errors(f"prepare the corpus in data.cache_directory={cache}"):
            new = prepare_together(config.data, settings.firsts())
            corpus = prepare_corpus(config.data, config.model.seq_length, 0)
        elapsed_s = time.perf_counter() - started_at
        if settings.output is not None:
            with machine_errors_as_user_errors(f"write output={settings.output}"):
                write_outputs(config.data, corpus, settings.output)
    except UserError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        exit_with_error("interrupted; the same command resumes", _INTERRUPTED)
    total = corpus.train.num_tokens + corpus.validation.num_tokens
    rate = (
        f", {new:,} of them new, {new / elapsed_s:,.0f} tokens/s" if new else ", none of them new"
    )
    sys.stdout.write(f"{total:,} tokens in {elapsed_s:.1f} s{rate}; cache: {cache}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*parse(sys.argv[1:])))
