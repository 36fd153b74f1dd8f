"""A training start has its corpus made by another process, and opens it from the cache."""

import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError
from configs.schema import DataConfig, WeightedSource
from data import Corpus, cached_corpus, prepare_corpus
from data.cache import locked
from data.corpus import build
from data.corpus.build import build_corpus
from tests.data.test_targets import chat_config
from tests.data_corpora import small_tokenizer, text_config, write_texts
from tests.lines import ROOT, import_closure

PREPARE = """
import logging, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
from configs.schema import DataConfig, WeightedSource
from data import prepare_corpus
logging.basicConfig(level=logging.INFO, format="%(message)s")
prepare_corpus(DataConfig(source="text", path=sys.argv[1], vocab_size=320, validation_fraction=0.2,
                          cache_directory=sys.argv[2]), 16, 0)
"""


@contextlib.contextmanager
def held_text(folder: Path) -> Iterator[None]:
    """Hold the lock of the text of `text_config(folder)`, which every preparation waits for."""
    build_corpus(text_config(folder, cache_directory=str(folder / "b")))
    (lock,) = (folder / "b").glob("text-*.lock")
    with locked([folder / "cache" / lock.stem]):
        yield


def cached(config: DataConfig) -> Corpus:
    """Build a corpus here, and open it."""
    build_corpus(config)
    return prepare_corpus(config, 16, 0)


def test_training_does_not_import_what_makes_tokens_of_text() -> None:
    """Not even lazily."""
    closure = import_closure(Path("train.py"))
    assert [file for file in closure if Path("data/corpus") in file.parents] == []


def test_another_process_makes_the_same_corpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """For all kinds of records; it logs as this process does, and a second start needs none."""
    write_texts(tmp_path, 20)
    held_out = str(tmp_path / "texts" / "012.txt")
    mixture = (
        WeightedSource("text", str(tmp_path / "texts" / "00*"), weight=3),
        WeightedSource("text", str(tmp_path / "texts" / "01*"), validation_path=held_out),
    )
    for config in (
        text_config(tmp_path),
        chat_config(tmp_path / "chats"),
        text_config(tmp_path, sources=mixture, source="python_stdlib", path=None),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "microtron"):
            corpus = prepare_corpus(config, 16, 0)
            assert "reading documents" in capfd.readouterr().err
            again = prepare_corpus(config, 16, 0)
            assert capfd.readouterr().err == ""
        assert caplog.text.count("document lengths in tokens") == 2
        other = replace(config, cache_directory=str(tmp_path / "other"))
        build_corpus(other)
        expected = prepare_corpus(other, 16, 0)
        for found in (corpus, again):
            assert (found.fingerprint, found.summary) == (expected.fingerprint, expected.summary)
            assert found.text_fingerprint == cached_corpus.find_text(config).fingerprint
            assert found.tokenizer_path.read_bytes() == expected.tokenizer.content


def test_errors_for_the_user_are_those_of_the_other_process(tmp_path: Path) -> None:
    """Word for word, also in letters beyond ASCII."""
    (tmp_path / "é").mkdir()
    (tmp_path / "é" / "latin.txt").write_bytes(b"\xe9")
    expected = r"data.path='.*é' yields no documents; skipped: 1 not UTF-8; give text in UTF-8"
    with pytest.raises(UserError, match=expected):
        prepare_corpus(text_config(tmp_path, path=str(tmp_path / "é")), 16, 0)


def test_errors_of_the_machine_come_from_the_other_process_too(tmp_path: Path) -> None:
    """Here a link that points to itself is where a lock belongs."""
    write_texts(tmp_path, 3)
    build_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")))
    (lock,) = (tmp_path / "b").glob("text-*.lock")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / lock.name).symlink_to(lock.name)
    expected = "cannot prepare the corpus in data.cache_directory=.*: Too many levels of symbolic"
    with pytest.raises(UserError, match=expected):
        prepare_corpus(text_config(tmp_path), 16, 0)


def test_a_preparation_that_is_killed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel does when memory is short."""
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            started.append(self)
            threading.Timer(0.5, self.kill).start()

    write_texts(tmp_path, 3)
    with held_text(tmp_path):
        monkeypatch.setattr("data.cached_corpus.subprocess.Popen", Recorded)
        expected = "the process that prepares the text was ended by SIGKILL; is there enough mem"
        with pytest.raises(UserError, match=expected):
            prepare_corpus(text_config(tmp_path), 16, 0)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_preparation_ends_with_the_start_that_wants_it(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Both write to the pipe that is read to its end here."""
    write_texts(tmp_path, 3)
    words = [sys.executable, "-c", PREPARE, str(tmp_path / "texts"), str(tmp_path / "cache")]
    with held_text(tmp_path):
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stderr is not None
        assert "waiting for another process to finish with" in process.stderr.readline()
        process.send_signal(number)
        process.communicate(timeout=30)


def test_a_folder_of_the_user_called_data_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python begins in the current folder with `-m`."""
    write_texts(tmp_path, 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    assert prepare_corpus(text_config(tmp_path), 16, 0).train.num_tokens > 0


def test_text_that_changes_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are then of another corpus than the start has asked for."""
    texts, make = write_texts(tmp_path, 3), cached_corpus._make

    def change(config: DataConfig) -> None:
        (tmp_path / "texts" / "000.txt").write_text(texts[0] + "more\n")
        make(config)

    monkeypatch.setattr(cached_corpus, "_make", change)
    with pytest.raises(UserError, match="the text has changed while it was read; start again"):
        prepare_corpus(text_config(tmp_path), 16, 0)


def test_a_corpus_of_other_tokens_is_described_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version of a library may train another tokenizer from the same text."""
    write_texts(tmp_path, 5)
    config = text_config(tmp_path)
    build_corpus(config)
    first = prepare_corpus(config, 16, 0)
    for name in ("tokenizer", "tokens"):
        (folder,) = (tmp_path / "cache").glob(f"{name}-*[!k]")
        shutil.rmtree(folder)
    train = build.train_tokenizer
    monkeypatch.setattr(build, "train_tokenizer", lambda text, size: train(text[::2], size))
    build_corpus(config)
    second = prepare_corpus(config, 16, 0)
    assert second.tokenizer.fingerprint != first.tokenizer.fingerprint
    assert second.fingerprint != first.fingerprint
    assert second.summary["train"]["tokens"] == second.train.num_tokens != first.train.num_tokens


def test_held_out_text_of_equal_sources_is_counted_twice(tmp_path: Path) -> None:
    """Both have the same folder of tokens."""
    write_texts(tmp_path, 9)
    text = str(tmp_path / "texts" / "00[0-5]*")
    sources = tuple(
        WeightedSource("text", text, validation_path=str(tmp_path / "texts" / f"00{n}.txt"))
        for n in (7, 8)
    )
    corpus = cached(text_config(tmp_path, sources=sources, source="python_stdlib", path=None))
    assert corpus.validation.num_documents == 2
    assert corpus.summary["validation"]["documents"] == 2
    assert corpus.summary["validation"]["tokens"] == corpus.validation.num_tokens


def test_weights_with_a_given_tokenizer_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a cache that cannot be written to serves all of them."""
    write_texts(tmp_path, 9)
    (tmp_path / "t.model").write_bytes(small_tokenizer().content)

    def config(weight: float) -> DataConfig:
        text = str(tmp_path / "texts" / "00")
        sources = tuple(WeightedSource("text", f"{text}{n}*", weight=weight) for n in ("[0-5]", 6))
        alone = {"source": "python_stdlib", "path": None, "tokenizer": str(tmp_path / "t.model")}
        return text_config(tmp_path, sources=sources, **alone)

    first = cached(config(1.0))
    monkeypatch.setattr(cached_corpus, "_make", None)
    assert prepare_corpus(config(2.0), 16, 0).fingerprint == first.fingerprint


def test_what_libraries_print_is_not_taken_for_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by a module that Python imports when it starts."""
    (tmp_path / "sitecustomize.py").write_text("print('hello')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="yields no documents"):
        prepare_corpus(text_config(tmp_path), 16, 0)
