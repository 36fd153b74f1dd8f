"""Preparing a corpus: the content of the cache, its integrity, and concurrent builders."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import UserError
from configs.schema import DataConfig
from data import Corpus, find_text
from data.cache import file_digest
from data.cached_corpus import SPLITS
from data.corpus.build import build_corpus
from data.corpus.encoding import encode_segments
from data.corpus.spool import Record, open_spool, sample_sentences, write_spool
from data.rows import Rows
from data.token_file import PARTS, TokenFile, Tokens, open_token_file
from tests.data_corpora import (
    prepare_corpus,
    random_text,
    small_tokenizer,
    text_config,
    write_texts,
)
from tests.lines import ROOT

PREPARE = """
import logging, sys
from configs.schema import DataConfig
from data.corpus.build import build_corpus
logging.basicConfig(level=logging.INFO, format="%(message)s")
build_corpus(DataConfig(source="text", path=sys.argv[1], vocab_size=320, validation_fraction=0.2,
                        cache_directory=sys.argv[2]))
"""


def start_preparing(folder: Path) -> "subprocess.Popen[str]":
    """Start another process that prepares `text_config(folder)`, with its log as stderr."""
    command = [sys.executable, "-c", PREPARE, str(folder / "texts"), str(folder / "cache")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_line(process: "subprocess.Popen[str]", words: str) -> None:
    """Return when the process has logged a line with these words."""
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"the process ended without logging {words!r}")


def documents(corpus: Corpus, file: Tokens) -> list[str]:
    """Return the texts of a split; check that each begins with bos and ends with eos."""
    texts = []
    for start, end in zip(file.document_offsets[:-1], file.document_offsets[1:], strict=True):
        ids = file.span(start, end).tolist()
        assert (ids[0], ids[-1]) == (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id)
        texts.append(corpus.tokenizer.decode(ids[1:-1]))
    assert [len(text.encode()) for text in texts] == file.document_bytes.tolist()
    return texts


def all_tokens(corpus: Corpus) -> np.ndarray[Any, Any]:
    """Return the tokens of the training split."""
    return corpus.train.span(0, corpus.train.num_tokens)


def entries(folder: Path) -> list[str]:
    """Return the names in the cache, without lock files and the index of digests."""
    names = (path.name for path in (folder / "cache").iterdir() if path.suffix != ".lock")
    return sorted(name for name in names if name != "digests.json")


def test_every_document_is_in_one_split_unchanged(tmp_path: Path) -> None:
    """Train keeps the source's order, duplicates are dropped, and the summary has the counts."""
    texts = write_texts(tmp_path, 30)
    (tmp_path / "texts" / "again.txt").write_text(texts[3])
    corpus = prepare_corpus(text_config(tmp_path), 16, 0)
    train, validation = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert train == [text for text in texts if text not in validation]
    assert sorted(train + validation) == sorted(texts)
    assert 1 <= len(validation) <= 15
    assert corpus.summary["skipped"] == {"duplicate": 1}
    assert corpus.summary["records"] == 31
    counts = corpus.summary["train"]
    assert counts["documents"] == sum(counts["lengths"]) == len(train)
    assert counts["bytes"] == sum(len(text.encode()) for text in train)
    assert counts["tokens"] == corpus.train.num_tokens
    assert corpus.tokenizer.vocab_size == 320
    assert corpus.train.span(0, 1).dtype == np.uint16
    assert corpus.tokenizer_path.read_bytes() == corpus.tokenizer.content


def test_a_document_stays_in_its_split_when_others_are_added(tmp_path: Path) -> None:
    """The split depends only on the content of a document."""
    write_texts(tmp_path, 40)
    before = prepare_corpus(text_config(tmp_path), 16, 0)
    for number in range(40, 60):
        (tmp_path / "texts" / f"{number}.txt").write_text(random_text(number, 20))
    after = prepare_corpus(text_config(tmp_path), 16, 0)
    held_out = set(documents(before, before.validation))
    assert held_out <= set(documents(after, after.validation))
    assert before.fingerprint != after.fingerprint


def test_the_end_of_a_single_document_is_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last `validation_fraction` of its bytes or a little more, from the start of a line."""
    (text,) = write_texts(tmp_path, 1, num_lines=600)
    corpus = prepare_corpus(text_config(tmp_path, validation_fraction=0.1), 16, 0)
    (head,), (end,) = documents(corpus, corpus.train), documents(corpus, corpus.validation)
    assert head + end == text
    assert head.endswith("\n")
    assert 0.1 <= len(end) / len(text) < 0.105
    assert corpus.summary["records"] == corpus.summary["ends_held_out"] == 1
    assert f"held-out text is only {len(end):,} bytes" in caplog.text


@pytest.mark.parametrize("num_lines", [600, 20_000])
def test_every_start_warns_about_little_held_out_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_lines: int
) -> None:
    """Also when the corpus is in the cache already; not for enough text."""
    write_texts(tmp_path, 1, num_lines=num_lines)
    for _ in range(2):
        caplog.clear()
        corpus = prepare_corpus(text_config(tmp_path, validation_fraction=0.05), 16, 0)
        is_little = corpus.summary["validation"]["bytes"] < 10_000
        assert is_little == (num_lines == 600)
        assert ("held-out text is only" in caplog.text) == is_little


def test_text_too_short_to_be_cut_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No warning if no evaluation is configured."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "x.txt").write_text("x")
    model = tmp_path / "given.model"
    model.write_bytes(small_tokenizer().content)
    config = text_config(tmp_path, tokenizer=str(model), sequence_mode="pad")
    for _ in range(2):
        caplog.clear()
        corpus = prepare_corpus(config, 16, 0)
        assert corpus.validation.num_documents == 0
        assert "there is no held-out text, so eval/loss is not computed; use" in caplog.text
    caplog.clear()
    prepare_corpus(replace(config, validation_fraction=0), 16, 0)
    assert "held-out" not in caplog.text


def test_a_source_without_documents_says_what_was_skipped(tmp_path: Path) -> None:
    """The error has key, value and counts, and there is no entry."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "empty.txt").write_bytes(b"")
    (tmp_path / "texts" / "latin.txt").write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"data\.source=text.*skipped: 1 empty, 1 not UTF-8"):
        prepare_corpus(text_config(tmp_path), 16, 0)
    assert all(name.endswith(".partial") for name in entries(tmp_path))


def test_too_little_text_for_a_row_names_the_longest_that_works(tmp_path: Path) -> None:
    """Mode pack needs one row; mode pad accepts shorter documents."""
    write_texts(tmp_path, 3)
    with pytest.raises(UserError, match=r"model\.seq_length=8192") as error:
        prepare_corpus(text_config(tmp_path), 8192, 0)
    longest = int(str(error.value).split("more text, model.seq_length=")[1].split()[0])
    corpus = prepare_corpus(text_config(tmp_path), longest, 0)
    assert len(Rows(corpus.train, longest, "pack")) == 1
    assert len(Rows(corpus.train, longest + 1, "pack")) == 0
    with pytest.raises(UserError, match=f"model.seq_length={longest} or less"):
        prepare_corpus(text_config(tmp_path), longest + 1, 0)
    prepare_corpus(text_config(tmp_path, sequence_mode="pad"), 8192, 0)


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    """It may have fewer pieces than data.vocab_size."""
    write_texts(tmp_path, 5)
    path = tmp_path / "given.model"
    path.write_bytes(small_tokenizer().content)
    config = text_config(tmp_path, tokenizer=str(path), vocab_size=1000)
    corpus = prepare_corpus(config, 16, 0)
    assert corpus.tokenizer.fingerprint == small_tokenizer().fingerprint
    assert len(documents(corpus, corpus.train)) + len(documents(corpus, corpus.validation)) == 5


def test_a_second_start_reads_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even after the source has moved; other settings have their own entries."""
    write_texts(tmp_path, 10)
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    (tmp_path / "texts").rename(tmp_path / "moved")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        second = prepare_corpus(text_config(tmp_path, path=str(tmp_path / "moved")), 16, 0)
    assert "preparing" not in caplog.text
    assert "tokenized" not in caplog.text
    assert (second.fingerprint, second.summary) == (first.fingerprint, first.summary)
    assert np.array_equal(all_tokens(first), all_tokens(second))
    other = prepare_corpus(
        text_config(tmp_path, path=str(tmp_path / "moved"), vocab_size=300), 16, 0
    )
    assert other.fingerprint != first.fingerprint
    kinds = [name.partition("-")[0] for name in entries(tmp_path)]
    assert kinds == ["corpus", "corpus", "documents", *2 * ["tokenizer"], *2 * ["tokens"]]


def test_preparation_is_reproducible(tmp_path: Path) -> None:
    """The fingerprint in checkpoints must match on another machine with the same source."""
    write_texts(tmp_path, 10)
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    second = prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(all_tokens(first), all_tokens(second))


def cut_short(path: Path) -> None:
    """Remove the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


def flip_bytes(path: Path) -> None:
    """Change bytes in the middle of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(byte ^ 0xFF for byte in content[middle : middle + 4])
    path.write_bytes(content)


ENTRY_FILES = [
    *(f"tokens-*/{split}.{part}" for split in SPLITS for part in PARTS),
    "tokens-*/tokenizer.model",
    "tokens-*/header.json",
    "corpus-*/header.json",
    "tokenizer-*/tokenizer.model",
    "tokenizer-*/header.json",
    "documents-*/hashes",
    "documents-*/sizes",
]


@pytest.mark.parametrize("damage", [cut_short, flip_bytes, Path.unlink])
@pytest.mark.parametrize("pattern", ENTRY_FILES)
def test_a_damaged_entry_is_rebuilt(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    pattern: str,
    damage: Callable[[Path], None],
) -> None:
    """With a warning, if any file is missing or has another size or other bytes."""
    write_texts(tmp_path, 10)
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    before = entries(tmp_path)
    (path,) = (tmp_path / "cache").glob(pattern)
    expected = documents(first, first.train)
    damage(path)
    caplog.clear()
    if pattern.startswith(("tokenizer-", "documents-")):  # training does not read them
        build_corpus(text_config(tmp_path))
    second = prepare_corpus(text_config(tmp_path), 16, 0)
    assert f"cache entry {path.parent} is damaged" in caplog.text
    assert documents(second, second.train) == expected
    assert (second.fingerprint, second.summary) == (first.fingerprint, first.summary)
    assert entries(tmp_path) == before


def test_facts_of_an_entry_are_verified_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A header may be well formed, but not what was written."""
    write_texts(tmp_path, 10)
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    path = first.tokenizer_path.parent / "header.json"
    path.write_text(path.read_text().replace('"vocab_size": 320', '"vocab_size": 321'))
    prepare_corpus(text_config(tmp_path), 16, 0)
    assert "is damaged; rebuilding it" in caplog.text
    assert json.loads(path.read_text())["vocab_size"] == 320


def test_a_damaged_entry_is_not_opened_by_other_ranks(tmp_path: Path) -> None:
    """They wait until local rank 0 has rebuilt it."""
    write_texts(tmp_path, 10)
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    expected = all_tokens(first).tolist()
    flip_bytes(first.tokenizer_path.parent / "train.tokens")
    found: list[list[int]] = []
    rank_1 = threading.Thread(
        target=lambda: found.append(
            all_tokens(prepare_corpus(text_config(tmp_path), 16, 1)).tolist()
        ),
        daemon=True,
    )
    rank_1.start()
    rank_1.join(timeout=1)
    assert found == []
    prepare_corpus(text_config(tmp_path), 16, 0)
    rank_1.join(timeout=20)
    assert found == [expected]


def test_an_entry_is_verified_again_only_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of size, times or inode; the result is stored next to the entries."""
    write_texts(tmp_path, 10)
    prepare_corpus(text_config(tmp_path), 16, 0)
    long_ago = time.time() - 100
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    prepare_corpus(text_config(tmp_path), 16, 0)
    hashed: list[str] = []
    monkeypatch.setattr(
        "data.cache.file_digest", lambda file: hashed.append(file.name) or file_digest(file)
    )
    prepare_corpus(text_config(tmp_path), 16, 0)
    assert hashed == []
    (path,) = (tmp_path / "cache").glob("tokens-*/train.offsets")
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, (long_ago, long_ago))
    other.rename(path)
    prepare_corpus(text_config(tmp_path), 16, 0)
    assert hashed == ["train.offsets"]


def test_a_text_that_changes_after_ranks_have_compared_it_is_an_error(tmp_path: Path) -> None:
    """A rank that looked again would wait for another corpus than the one that is made."""
    write_texts(tmp_path, 1)
    text = find_text(text_config(tmp_path))
    with (tmp_path / "texts" / "000.txt").open("a") as file:
        file.write("more")
    with pytest.raises(UserError, match="the text has changed while it was read; start again"):
        prepare_corpus(text_config(tmp_path), 16, 0, text)


def test_a_damaged_index_of_digests_is_not_trusted(tmp_path: Path) -> None:
    """A changed digit would give the text another fingerprint; the index is made anew."""
    write_texts(tmp_path, 1)
    long_ago = time.time() - 100
    os.utime(tmp_path / "texts" / "000.txt", (long_ago, long_ago))
    expected = find_text(text_config(tmp_path)).fingerprint
    path = tmp_path / "cache" / "digests.json"
    content = path.read_text()
    digest = file_digest(tmp_path / "texts" / "000.txt").hex()
    assert digest in content
    for damaged in (
        content.replace(digest, digest[::-1]),
        content.replace(digest, f"g{digest[1:]}"),
        json.dumps({str(tmp_path / "texts" / "000.txt"): 3}),
        "[]",
        "3",
        "",
    ):
        path.write_text(damaged)
        assert find_text(text_config(tmp_path)).fingerprint == expected
        assert path.read_text() == content


def test_a_text_edited_in_place_with_its_old_mtime_is_noticed(tmp_path: Path) -> None:
    """mtime can be set at will; ctime cannot."""
    write_texts(tmp_path, 10)
    file = tmp_path / "texts" / "003.txt"
    long_ago = time.time() - 100
    os.utime(file, (long_ago, long_ago))
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    text = file.read_text().swapcase()
    with file.open("r+") as stream:
        stream.write(text)
    os.utime(file, (long_ago, long_ago))
    second = prepare_corpus(text_config(tmp_path), 16, 0)
    assert second.fingerprint != first.fingerprint
    assert text in [*documents(second, second.train), *documents(second, second.validation)]


def test_other_ranks_wait_for_local_rank_0(tmp_path: Path) -> None:
    """They build nothing themselves, and get the same corpus."""
    write_texts(tmp_path, 10)
    found: list[Corpus] = []
    rank_1 = threading.Thread(
        target=lambda: found.append(prepare_corpus(text_config(tmp_path), 16, 1)), daemon=True
    )
    rank_1.start()
    assert found == []
    corpus = prepare_corpus(text_config(tmp_path), 16, 0)
    rank_1.join(timeout=20)
    assert [each.fingerprint for each in found] == [corpus.fingerprint]


def test_two_runs_at_once_prepare_once(tmp_path: Path) -> None:
    """Both wait for the lock; one builds the corpus and the other finds it."""
    write_texts(tmp_path, 10)
    prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    (lock,) = (tmp_path / "b").glob("text-*.lock")  # named by the source
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / lock.name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        runs = [start_preparing(tmp_path) for _ in range(2)]
        for run in runs:
            wait_for_line(run, "waiting for another process")
    logs = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "".join(logs).count("tokenized data in") == 1
    assert len(entries(tmp_path)) == 4


def test_a_rank_waits_while_another_hashes_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other process may be a rank of the same run, so the log must not name another run."""
    write_texts(tmp_path, 1)
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "digests.json.lock").open("w") as file, caplog.at_level("INFO"):
        fcntl.flock(file, fcntl.LOCK_EX)
        rank = threading.Thread(target=find_text, args=[text_config(tmp_path)])
        rank.start()
        while "waiting for another process" not in caplog.text:
            time.sleep(0.01)
        fcntl.flock(file, fcntl.LOCK_UN)
        rank.join()
    assert "run" not in caplog.text.replace(str(tmp_path), "")


def test_the_log_counts_in_singular_and_plural(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1 record, 2 documents; lengths are ranges of tokens."""
    write_texts(tmp_path, 1, num_lines=600)
    with caplog.at_level("INFO"):
        prepare_corpus(text_config(tmp_path), 16, 0)
    assert "1 record gave 1 document, 1 with their end held out\n" in caplog.text
    assert "train: 1 document, " in caplog.text
    assert "document lengths in tokens: 16385-32768 100%" in caplog.text


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    """65536 ids fit in two bytes, one more does not."""
    for vocab_size, dtype in ((65_536, "<u2"), (65_537, "<u4")):
        for part, content in (("tokens", np.array([65_535], dtype)), ("offsets", np.array([0, 1]))):
            (tmp_path / f"x.{part}").write_bytes(content.tobytes())
        (tmp_path / "x.bytes").write_bytes(np.array([3]).tobytes())
        assert open_token_file(tmp_path, "x", vocab_size).tokens.tolist() == [65_535]


def test_an_id_beyond_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    """A file damaged after it was verified: the error has the place and the fix."""
    write_texts(tmp_path, 6)
    file = prepare_corpus(text_config(tmp_path), 16, 0).train
    assert isinstance(file, TokenFile)
    assert file.path is not None
    with file.path.open("r+b") as stream:
        stream.seek(2 * 40)
        stream.write(b"\xff\xff")
    assert len(file.span(0, 40)) == 40
    with pytest.raises(ValueError, match=rf"token 40 of {file.path} is 65535, but .* up to 319:"):
        file.span(30, 50)


def test_a_tokenizer_with_ids_beyond_its_size_is_rejected() -> None:
    """Before they are in a verified file."""
    tokenizer = copy(small_tokenizer())
    tokenizer.vocab_size = 10
    with pytest.raises(ValueError, match=r"gives id \d+, but has 10 pieces"):
        list(encode_segments([["", "self"]], tokenizer, np.dtype("<u2")))


def test_the_tokenizer_learns_from_a_bounded_sample_of_training_lines(tmp_path: Path) -> None:
    """Lines are evenly spread, keep their indentation, and have about the requested size."""
    texts = [random_text(seed, 200) for seed in range(20)]
    write_spool(tmp_path, lambda _: [Record([text], None) for text in texts])
    spool = open_spool([tmp_path])
    lines = list(sample_sentences(spool, np.arange(5, 20), max_bytes=30_000))
    allowed = {line for text in texts[5:] for line in text.split("\n")}
    assert set(lines) <= allowed
    assert any(line.startswith("    ") for line in lines)
    assert sum(len(line) for line in lines) == pytest.approx(30_000, rel=0.1)
    everything = list(sample_sentences(spool, np.arange(20), max_bytes=10**9))
    assert everything == [line for text in texts for line in text.split("\n") if line]


@pytest.mark.slow
def test_the_default_source_works(tmp_path: Path) -> None:
    """The standard library: thousands of documents, no download, exact bytes."""
    config = DataConfig(vocab_size=1024, cache_directory=str(tmp_path))
    corpus = prepare_corpus(config, 256, 0)
    counts: dict[str, Any] = corpus.summary
    assert counts["train"]["documents"] > 500
    assert counts["validation"]["documents"] >= 5
    assert counts["validation"]["bytes"] == int(corpus.validation.document_bytes.sum())
    assert json.dumps(counts)
    for split in (corpus.train, corpus.validation):
        end = int(split.document_offsets[1])
        text = corpus.tokenizer.decode(split.span(1, end - 1).tolist())
        assert len(text.encode()) == split.document_bytes[0]
        assert split.num_tokens == split.document_offsets[-1]
        assert int(split.span(0, split.num_tokens).max()) < 1024
