"""`python -m data.prepare`: the cache of a training start, without torch, by several shards."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from configs import UserError
from configs.schema import DataConfig, WeightedSource
from data import TokenFile
from data.corpus import build as build_module
from data.corpus.entries import share_jobs
from data.prepare import Settings, outputs, write_dataset
from data.token_file import TokenArray
from tests.data.test_megatron import all_documents
from tests.data_chats import messages_of, write_byte_tokenizer, write_chats
from tests.data_corpora import (
    prepare_corpus,
    random_text,
    small_tokenizer,
    text_config,
    token_file,
    write_texts,
)
from tests.lines import ROOT

NO_TORCH = """
import runpy, sys
try:
    runpy.run_module("data.prepare", run_name="__main__", alter_sys=True)
finally:
    assert "torch" not in sys.modules
"""
# Parts and pieces of a few documents each.
SMALL_PIECES = """
import sys
from data import prepare
from data.corpus import build, encoding
encoding._PIECE_BYTES = build._PART_BYTES = 3_000
sys.exit(prepare.main(*prepare.parse(sys.argv[1:])))
"""


def arguments(folder: Path, *more: str) -> list[str]:
    """Return the settings of `text_config(folder)`, with a layout of more ranks than one."""
    path = folder / "c.yaml"
    path.write_text(
        "model: {num_layers: 1, hidden_size: 8, num_attention_heads: 2, seq_length: 16}\n"
        "parallel: {tensor_model_parallel_size: 2}\n"
        f"data: {{source: text, path: {folder / 'texts'}, vocab_size: 320,"
        f" validation_fraction: 0.2, cache_directory: {folder / 'cache'}}}\n"
    )
    return [f"config={path}", *more]


def start(command: list[str], code: str | None = None) -> "subprocess.Popen[str]":
    """Start `python -m data.prepare`, or code in its place."""
    program = ["-m", "data.prepare"] if code is None else ["-c", code]
    pipe = subprocess.PIPE
    words = [sys.executable, *program, *command]
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def run(command: list[str], code: str | None = None) -> tuple[int, str, str]:
    """Run it to its end; return exit code, stdout and stderr."""
    process = start(command, code)
    output, log = process.communicate(timeout=300)
    return process.returncode, output, log


def content(cache: Path) -> dict[str, bytes]:
    """Return every file of a cache but locks and the index of digests."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(f.relative_to(cache)): f.read_bytes() for f in files if f.name != "digests.json"}


def files(cache: Path) -> set[str]:
    """Return the paths in a cache that processes are changing."""
    return {os.path.join(folder, name) for folder, _, names in os.walk(cache) for name in names}


def test_it_fills_the_cache_of_a_training_start_without_torch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of parquet, which `datasets` reads; training then tokenizes nothing."""
    texts = write_texts(tmp_path, 20)
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    parquet = ("data.source=parquet", f"data.path={tmp_path / 't.parquet'}")
    for more, changes in (
        ((), {}),
        (parquet, {"source": "parquet", "path": str(tmp_path / "t.parquet")}),
    ):
        code, output, log = run(arguments(tmp_path, *more), NO_TORCH)
        assert code == 0, log
        assert "reading documents" in log
        assert "document lengths in tokens" in log
        caplog.clear()
        with caplog.at_level(logging.INFO):
            corpus = prepare_corpus(text_config(tmp_path, **changes), 16, 0)
        assert "preparing" not in caplog.text
        assert "tokenized" not in caplog.text
        total = corpus.train.num_tokens + corpus.validation.num_tokens
        assert output.startswith(f"{total:,} tokens in ")
        assert f", {total:,} of them new, " in output
        assert output.endswith(f" tokens/s; cache: {tmp_path / 'cache'}\n")
        _, output, _ = run(arguments(tmp_path, *more), NO_TORCH)
        assert output.startswith(f"{total:,} tokens in ")
        assert "none of them new" in output


@pytest.mark.parametrize("n", [1, 3])
def test_shards_build_the_same_bytes_at_once(tmp_path: Path, n: int) -> None:
    """Whatever their number, on one shared folder; nothing else is left in it."""
    write_texts(tmp_path, 40)
    prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    commands = [arguments(tmp_path, f"shard={i}/{n}", "processes=1") for i in range(1, n + 1)]
    shards = [start(command, SMALL_PIECES) for command in commands]
    logs = [shard.communicate(timeout=300) for shard in shards]
    assert [shard.returncode for shard in shards] == [0] * n, logs
    assert content(tmp_path / "cache") == content(tmp_path / "b")


@pytest.mark.slow
def test_shards_of_conversations_build_the_same_bytes(tmp_path: Path) -> None:
    """Targets included, by two shards that are killed and repeated; then nothing is left to do."""
    chats, tokenizer = tmp_path / "chats", write_byte_tokenizer(tmp_path / "bytes")
    chats.mkdir()
    write_chats(chats / "0.jsonl")
    for number in range(1, 10):
        rows = [
            {"messages": messages_of([f"u:{random_text(30 * number + i, 3)}", f"a:{i}é", "a:Ok"])}
            for i in range(30)
        ]
        (chats / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"source": "jsonl", "path": str(chats), "tokenizer": str(tokenizer)}
    changes |= {"format": "messages", "cache_directory": str(tmp_path / "b")}
    corpus = prepare_corpus(text_config(tmp_path, **changes), 16, 0)
    assert corpus.train.targets is not None
    assert corpus.train.targets.num_targets > 3 * 200
    keys = [f"data.{key}={changes[key]}" for key in ("source", "path", "tokenizer", "format")]
    commands = [arguments(tmp_path, f"shard={i}/2", "processes=1", *keys) for i in (1, 2)]
    shards = [start(command, SMALL_PIECES) for command in commands]
    while shards[0].poll() is None and not any((tmp_path / "cache").glob("text-*/*.targets")):
        time.sleep(0.001)
    for shard in shards:
        shard.kill()
        shard.communicate()
    shards = [start(command, SMALL_PIECES) for command in commands]
    logs = [shard.communicate(timeout=300) for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0], logs
    assert content(tmp_path / "cache") == content(tmp_path / "b")
    code, output, log = run(commands[0], NO_TORCH)
    assert code == 0, log
    assert "none of them new" in output


def test_one_command_shares_the_work_among_processes(tmp_path: Path) -> None:
    """More than there are cores; the log and the last line are those of one."""
    write_texts(tmp_path, 20)
    prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    code, output, log = run(arguments(tmp_path, "processes=3"))
    assert code == 0, log
    assert (output.count("\n"), log.count("document lengths")) == (1, 1)
    assert content(tmp_path / "cache") == content(tmp_path / "b")


@pytest.mark.slow
def test_killed_shards_are_repeated_or_joined_by_training(tmp_path: Path) -> None:
    """Kill -9 at any moment; what was done stays done, and the bytes are the same."""
    (tmp_path / "texts").mkdir()
    for number in range(150):
        (tmp_path / "texts" / f"{number:03}.txt").write_text(random_text(number, 60))
    prepare_corpus(text_config(tmp_path, cache_directory=str(tmp_path / "b")), 16, 0)
    rng = random.Random(0)
    commands = [arguments(tmp_path, f"shard={i}/2", "processes=1") for i in (1, 2)]
    for _ in range(4):
        known, num_new = files(tmp_path / "cache"), rng.randrange(2, 12)
        shards = [start(command, SMALL_PIECES) for command in commands]
        while len(files(tmp_path / "cache") - known) < num_new and shards[0].poll() is None:
            time.sleep(0.001)
        for shard in shards:
            os.kill(shard.pid, signal.SIGKILL)
            shard.communicate()
    prepare_corpus(text_config(tmp_path), 16, 0)
    assert content(tmp_path / "cache") == content(tmp_path / "b")


def test_work_of_a_killed_process_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither parts that were read nor pieces that were tokenized."""
    write_texts(tmp_path, 20)
    monkeypatch.setattr(build_module, "_PART_BYTES", 3_000)
    monkeypatch.setattr("data.corpus.encoding._PIECE_BYTES", 3_000)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_fill_tokens", die)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(text_config(tmp_path), 16, 0)
    monkeypatch.setattr(build_module, "_fill_part", die)
    monkeypatch.setattr("data.corpus.encoding._encode_piece", die)
    assert build_module.build_corpus(text_config(tmp_path)) == 0
    assert prepare_corpus(text_config(tmp_path), 16, 0).train.num_tokens > 0


def test_every_job_is_done_once_by_processes_that_share(tmp_path: Path) -> None:
    """Each begins at its own place and takes what no other one holds."""
    done: list[tuple[int, str]] = []
    all_have_begun = threading.Barrier(3, timeout=60)

    def work(worker: int) -> None:
        sizes = {tmp_path / str(i): 1 for i in range(30)}
        for number, (path, _) in enumerate(share_jobs("working", sizes, worker / 3)):
            if number == 0:
                all_have_begun.wait()
            time.sleep(0.01)
            done.append((worker, path.name))
            path.touch()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(int(name) for _, name in done) == list(range(30))
    firsts = dict(reversed(done))
    assert firsts == {0: "0", 1: "10", 2: "20"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard=3/2"], "shard=3/2 is not one of n parts; write i/n"),
        (["shrad=1/2"], "there is no key shrad; did you mean shard?"),
        (
            ["output=x", "data.source=jsonl", "data.format=messages"],
            "output=x would lose which tokens are targets, for Megatron's files have only tokens",
        ),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (["shard=0/2"], "shard=0/2 is not one of n parts"),
                (["shard=a"], "shard=a is not one of n parts"),
                (["processes=0"], "processes=0 is out of range; it must be at least 1"),
                (["data.sorce=text"], "there is no key data.sorce; did you mean data.source=text?"),
                (["data.path=/none"], "data.path=/none does not exist"),
                (["output=/dev/null/x"], "output=/dev/null/x: cannot make its parent directory"),
            )
        ),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    """Exit code 2, before anything is read."""
    write_texts(tmp_path, 2)
    code, output, log = run(arguments(tmp_path, *words))
    assert (code, output, log.count("\n")) == (2, "", 1), log
    assert message in log
    assert not (tmp_path / "cache").exists()


def test_help_describes_its_settings(tmp_path: Path) -> None:
    """The command can be copied from it."""
    code, output, _ = run(["--help"])
    assert code == 0
    assert output.startswith("Usage: python -m data.prepare key=value ...")
    assert "  shard  (string; default 1/1)" in output


def test_bad_text_is_one_line_whoever_reads_it(tmp_path: Path) -> None:
    """Not one for each process."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    code, _, log = run(arguments(tmp_path, "processes=3", "data.source=jsonl"))
    assert code == 2
    assert log.count("data.path: line 2 of") == 1
    assert "Traceback" not in log


def test_the_output_is_the_corpus_in_megatrons_format(tmp_path: Path) -> None:
    """Reading it back gives the same corpus; nothing is overwritten."""
    write_texts(tmp_path, 20)
    prefix = tmp_path / "o"
    code, _, log = run(arguments(tmp_path, f"output={prefix}"))
    assert code == 0, log
    first = prepare_corpus(text_config(tmp_path), 16, 0)
    changes = {
        "source": "megatron",
        "path": str(prefix),
        "validation_path": f"{prefix}_validation",
        "tokenizer": str(first.tokenizer_path),
    }
    second = prepare_corpus(text_config(tmp_path, **changes), 16, 0)
    assert all_documents(first) == all_documents(second)
    code, _, log = run(arguments(tmp_path, f"output={prefix}"))
    assert (code, log.count("\n")) == (2, 1)
    assert f"output={prefix}: {prefix}.bin already exists" in log


def test_of_two_commands_with_one_output_only_the_first_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins first, fails when it is done, and leaves nothing behind."""
    prefix, tokenizer = tmp_path / "o", small_tokenizer()
    slow, quick, span = token_file([30, 20]), token_file([10]), TokenFile.span

    def overtaken(file: TokenFile, start: int, stop: int) -> TokenArray:
        if file is slow and start > 0:
            write_dataset(prefix, quick, tokenizer)
        return span(file, start, stop)

    monkeypatch.setattr(TokenFile, "span", overtaken)
    message = f"output={prefix}: {prefix}.bin already exists"
    with pytest.raises(UserError, match=message):
        write_dataset(prefix, slow, tokenizer)
    monkeypatch.setattr("data.prepare.require_new", lambda prefix: None)  # both at the same moment
    with pytest.raises(UserError, match=message):
        write_dataset(prefix, slow, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.bin", "o.idx"]
    tokens = np.fromfile(tmp_path / "o.bin", "<u2")
    assert tokens.tolist() == quick.tokens.tolist()


def test_outputs_of_a_mixture_are_numbered() -> None:
    """Each source has its own, as --data-path of Megatron-LM wants them."""
    config = text_config(Path("/x"))
    assert [str(path) for path, _ in outputs(config, "/o/p")] == ["/o/p", "/o/p_validation"]
    plain, with_validation = (
        WeightedSource("text", "/a", validation_path=path) for path in (None, "/v")
    )
    config = DataConfig(sources=(plain, with_validation, plain))
    names = [path.name for path, _ in outputs(config, "/o/p")]
    assert names == ["p_0", "p_1", "p_2", "p_1_validation"]
    settings = Settings(shard="2/2", processes=2)
    assert settings.firsts() == [0.5, 0.75]
