"""A killed preparation resumes from its last durable state and builds the same corpus."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data.cache import replace_durably
from data.corpus import encoding as encoding_module
from data.corpus import spool as spool_module
from data.corpus.spool import SPOOL_FILES
from data.source_files import source_fingerprint
from tests.data_corpora import prepare_corpus, random_text, text_config, write_texts
from tests.lines import ROOT

PREPARE = """
import logging, sys
from configs.schema import DataConfig
from data.corpus import encoding, spool
from data.corpus.build import build_corpus
logging.basicConfig(level=logging.INFO, format="%(message)s")
spool._DURABLE_BYTES = encoding._PIECE_BYTES = encoding._BATCH_BYTES = 20_000
build_corpus(DataConfig(source="text", path=sys.argv[1], vocab_size=320, validation_fraction=0.2,
                        cache_directory=sys.argv[2]))
"""


class Killed(BaseException):
    """Stands for kill -9; no code of ours may catch it."""


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make progress durable every few documents."""
    monkeypatch.setattr(spool_module, "_DURABLE_BYTES", 2_000)
    monkeypatch.setattr(encoding_module, "_PIECE_BYTES", 2_000)
    monkeypatch.setattr(encoding_module, "_BATCH_BYTES", 1_000)


def die_at(monkeypatch: pytest.MonkeyPatch, call: int, *, after: bool) -> list[str]:
    """End the preparation at its n-th durable write; return the list of all writes."""
    calls: list[str] = []

    def replace(path: Path, content: bytes) -> None:
        calls.append(path.name)
        if len(calls) == call and not after:
            raise Killed
        replace_durably(path, content)
        if len(calls) == call:
            # Later writes may be on disk in part.
            for file in path.parent.iterdir():
                if file.name in SPOOL_FILES:
                    with file.open("ab") as stream:
                        stream.write(b"torn")
            raise Killed

    for module in (spool_module, encoding_module):
        monkeypatch.setattr(module, "replace_durably", replace)
    return calls


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_durable_write_gives_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Each attempt gets one write further, until one finishes."""
    texts = write_texts(tmp_path, 12)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "texts" / "again.txt").write_text(texts[3])
    expected = prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    attempts = 0
    while True:
        # The first two writes of an attempt may repeat the state of the last one.
        calls = die_at(monkeypatch, 3, after=after)
        attempts += 1
        try:
            corpus = prepare_corpus(text_config(tmp_path), 16, 0)
        except Killed:
            assert attempts < 60, "no progress"
            continue
        break
    assert len(calls) < 3
    assert attempts > 4
    assert (corpus.fingerprint, corpus.summary) == (expected.fingerprint, expected.summary)


@pytest.mark.usefixtures("small_pieces")
def test_durable_work_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill during encoding, nothing is read again and only the rest is encoded."""
    write_texts(tmp_path, 30)
    die_at(monkeypatch, 1_000_000, after=True)
    counted = prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    calls = die_at(monkeypatch, 26, after=True)
    with pytest.raises(Killed):
        prepare_corpus(text_config(tmp_path), 16, 0)
    assert calls[-1].startswith("train-")
    encoded: list[int] = []
    encode = counted.tokenizer.__class__.encode_batch

    def counting(self: Any, texts: list[str]) -> Any:
        encoded.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(counted.tokenizer.__class__, "encode_batch", counting)
    again = die_at(monkeypatch, 1_000_000, after=True)
    corpus = prepare_corpus(text_config(tmp_path), 16, 0)
    assert corpus.fingerprint == counted.fingerprint
    assert again[0].startswith(("train-", "validation-"))
    assert "spool.progress.json" not in again
    assert 0 < sum(encoded) < 28


def progress(cache: Path) -> set[tuple[str, int]]:
    """Return the durable states of preparations in a cache, by name and time."""
    found = set()
    names = "*.partial/*progress.json", f"train-{'?' * 32}"
    for path in (path for name in names for path in cache.glob(f"text-*/{name}")):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def test_after_kill_9_the_next_process_resumes(tmp_path: Path) -> None:
    """Three times, each as soon as there is new durable progress."""
    (tmp_path / "texts").mkdir()
    for number in range(150):
        (tmp_path / "texts" / f"{number:03}.txt").write_text(random_text(number, 60))
    expected = prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    command = [sys.executable, "-c", PREPARE, str(tmp_path / "texts"), str(tmp_path / "cache")]
    kills = 0
    while True:
        known = progress(tmp_path / "cache")
        run = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        while run.poll() is None and (kills == 3 or progress(tmp_path / "cache") == known):
            time.sleep(0.001)
        if run.poll() is not None:
            break
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        kills += 1
    assert (run.returncode, kills) == (0, 3)
    corpus = prepare_corpus(text_config(tmp_path), 16, 0)
    assert (corpus.fingerprint, corpus.summary) == (expected.fingerprint, expected.summary)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_an_abandoned_preparation_is_deleted(tmp_path: Path) -> None:
    """After a week without writes, not earlier."""
    write_texts(tmp_path, 6)
    old, young = (tmp_path / "cache" / f"text-{name}.partial" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "text").write_text("half of it")
    long_ago = time.time() - 8 * 24 * 3600
    for path in (old / "text", old):
        os.utime(path, (long_ago, long_ago))
    prepare_corpus(text_config(tmp_path), 16, 0)
    assert not old.exists()
    assert young.exists()


def test_a_file_is_read_again_only_if_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known by size and times, unless it was written just now."""
    write_texts(tmp_path, 3)
    config, cache = text_config(tmp_path), tmp_path / "cache"
    files = sorted((tmp_path / "texts").iterdir())
    long_ago = time.time() - 100
    for file in files[1:]:
        os.utime(file, (long_ago, long_ago))
    first = source_fingerprint(config, files, cache)
    hashed: list[str] = []
    digest = sys.modules["data.cache"].file_digest
    monkeypatch.setattr(
        "data.cache.file_digest", lambda file: hashed.append(file.name) or digest(file)
    )
    assert source_fingerprint(config, files, cache) == first
    assert hashed == [files[0].name]
    files[1].write_bytes(files[1].read_bytes().swapcase())
    assert source_fingerprint(config, files, cache) != first
    (cache / "digests.json").write_text('{"half')
    hashed.clear()
    source_fingerprint(config, files, cache)
    assert hashed == [file.name for file in files]
