"""Speed of building a corpus, beside sentencepiece alone; its memory, and the cost of a kill.

    python -m bench.ingestion [PATTERN ...]      these text files besides the standard library

By default it reads the Python files of all installed packages. Each measurement is a process of its
own with an empty cache. Prints a table for docs/results.md.
"""

import argparse
import logging
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import sentencepiece

from configs import DataConfig, WeightedSource
from data import prepare_corpus
from data.corpus.build import build_corpus
from data.source_files import source_files

ROOT = Path(__file__).parent.parent
_BATCH = 256  # texts that plain sentencepiece is given at once; all at once takes more memory
_NUM_KILLS = 3
_POLL_S = 0.05


def config_of(patterns: list[str], cache: Path) -> DataConfig:
    """The standard library and each pattern, with weights of one."""
    sources = (WeightedSource(), *(WeightedSource("text", pattern) for pattern in patterns))
    return DataConfig(sources=sources, cache_directory=str(cache))


def encode_plainly(patterns: list[str], model: Path) -> tuple[int, int, float]:
    """Encodes all texts with sentencepiece alone, on all cores: (bytes, tokens, seconds)."""
    texts = []
    for source in config_of(patterns, Path("unused")).mixture.values():
        for file in source_files(source):
            try:
                texts.append(file.read_bytes().decode())
            except UnicodeDecodeError:
                continue
    texts = list(dict.fromkeys(texts))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    threads = len(os.sched_getaffinity(0))
    started_at, num_tokens = time.perf_counter(), 0
    for start in range(0, len(texts), _BATCH):
        batch = processor.encode(texts[start : start + _BATCH], num_threads=threads)
        num_tokens += sum(map(len, batch))
    elapsed_s = time.perf_counter() - started_at
    return sum(len(text.encode()) for text in texts), num_tokens, elapsed_s


class TimesToTokenize(logging.Handler):
    """Adds up what the log says that tokenizing a source took."""

    total_s = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the seconds out of a record that has them."""
        if record.msg.startswith("tokenized") and isinstance(record.args, tuple):
            self.total_s += float(str(record.args[1]))


def launch(task: str, *arguments: str) -> "subprocess.Popen[str]":
    """Starts this file in another process."""
    command = [sys.executable, "-m", "bench.ingestion", f"--task={task}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def measure(patterns: list[str], cache: Path, kill_after_s: float | None = None) -> list[float]:
    """Prepares in another process; returns (seconds, those of tokenizing, peak MB, of these not of
    files), or nothing if it was killed."""
    started_at = time.perf_counter()
    process = launch("prepare", f"--cache={cache}", *patterns)
    anonymous_mb = 0.0
    while process.poll() is None:
        time.sleep(_POLL_S)
        anonymous_mb = max(anonymous_mb, _anonymous_mb(process.pid))
        if kill_after_s is not None and time.perf_counter() - started_at > kill_after_s:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return []
    told = process.communicate()[0].split()
    if process.returncode:
        raise RuntimeError(f"the preparation ended with {process.returncode}")
    return [time.perf_counter() - started_at, *map(float, told), anonymous_mb]


def _anonymous_mb(process_id: int) -> float:
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return 0.0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0][1]) / 1024 if lines else 0.0


def main() -> None:
    """Prepares, encodes plainly, prepares again with kills in between."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--task", default="all", choices=["all", "prepare", "plain"])
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--model", type=Path)
    arguments = parser.parse_args()
    packages = f"{sysconfig.get_path('purelib')}/**/*.py"
    patterns = arguments.patterns or [packages]
    if arguments.task == "prepare":
        times = TimesToTokenize()
        logging.getLogger("microtron").addHandler(times)
        logging.getLogger("microtron").setLevel(logging.INFO)
        build_corpus(config_of(patterns, arguments.cache))
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sys.stdout.write(f"{times.total_s} {peak_mb}\n")
        return
    if arguments.task == "plain":
        sys.stdout.write(" ".join(map(str, encode_plainly(patterns, arguments.model))) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(patterns, Path(folder))


def compare(patterns: list[str], folder: Path) -> None:
    """Prints what each way took."""
    whole = measure(patterns, folder / "whole")
    corpus = prepare_corpus(config_of(patterns, folder / "whole"), 1024, 0)
    split = [corpus.summary[name] for name in ("train", "validation")]
    num_bytes, num_tokens = (sum(part[name] for part in split) for name in ("bytes", "tokens"))
    plain = launch("plain", f"--model={corpus.tokenizer_path}", *patterns).communicate()[0].split()
    kills = 0
    killed: list[float] = []
    started_at = time.perf_counter()
    while not killed:
        # Attempts get a sixth of the time of all; the last is let go to the end.
        limit_s = whole[0] / (2 * _NUM_KILLS) if kills < _NUM_KILLS else None
        killed = measure(patterns, folder / "killed", limit_s)
        kills += not killed
    killed_s = time.perf_counter() - started_at
    again = prepare_corpus(config_of(patterns, folder / "killed"), 1024, 0)
    if again.fingerprint != corpus.fingerprint:
        raise RuntimeError("killed, it made another corpus")
    total_s, tokenizing_s, peak_mb, anonymous_mb = whole
    rate, plain_rate = num_tokens / tokenizing_s, int(plain[1]) / float(plain[2])
    rows = [
        ("text; tokens", f"{num_bytes / 1e6:.1f} MB", f"{num_tokens:,}"),
        ("read, tokenizer trained, tokenized", f"{total_s:.1f} s", ""),
        ("of it tokenizing", f"{tokenizing_s:.1f} s", f"{rate / 1e6:.2f} million tokens a second"),
        ("sentencepiece alone", f"{float(plain[2]):.1f} s", f"{plain_rate / 1e6:.2f} million"),
        ("peak memory; without files' pages", f"{peak_mb:.0f} MB", f"{anonymous_mb:.0f} MB"),
        (f"killed {kills} times, all attempts", f"{killed_s:.1f} s", f"peak {killed[2]:.0f} MB"),
    ]
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    main()
