"""Runs through the real command line: start, kill, Ctrl-C, resume."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.lines import ROOT
from tests.runs import (
    LONG,
    finish,
    launch,
    rows,
    settings,
    start,
    steps_done,
    wait_for,
    workers_of,
)
from tests.training.test_watchdog import inject
from tests.wandb_server import logs, records

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD")


@pytest.mark.parametrize("victim", [pytest.param("launcher", marks=pytest.mark.slow), "one rank"])
def test_kill_9_loses_nothing(
    corpus: Path, tmp_path: Path, unbroken: list[dict[str, Any]], victim: str
) -> None:
    """After a kill and a resume, every loss equals the uninterrupted run's, bit for bit."""
    arguments = settings(corpus, tmp_path, *LONG)
    process = start(2, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 12, process)
    workers = list(workers_of(tmp_path))
    assert len(workers) == 2
    if victim == "launcher":
        process.kill()
    else:
        os.kill(workers[1], signal.SIGKILL)
    process.communicate(timeout=300)
    output = finish(start(2, arguments))
    assert "resuming from" in output
    assert rows(tmp_path) == unbroken


def test_a_step_is_saved_before_it_is_evaluated(corpus: Path, tmp_path: Path) -> None:
    """So a kill in an evaluation loses nothing, and the resume makes it up, once."""
    extra = ("evaluate.interval=3", "checkpoint.save_interval=3", "checkpoint.async_save=false")
    arguments = settings(corpus, tmp_path, *extra, "train.train_steps=5")
    process = start(1, [*arguments, "evaluate.sample_tokens=20000"])
    checkpoint = tmp_path / "test" / "checkpoints" / "step_00000003"
    wait_for(checkpoint.exists, process)
    for worker in workers_of(tmp_path):
        os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=300)
    assert not [row for row in rows(tmp_path) if "eval/loss" in row]
    assert f"resuming from {checkpoint}" in finish(start(1, arguments))
    assert [row["step"] for row in rows(tmp_path) if "eval/loss" in row] == [3, 5]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3, 4, 5, 5]


@pytest.mark.parametrize(
    ("number", "ranks"),
    [pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow), (signal.SIGTERM, 1)],
)
def test_a_signal_saves_and_the_run_resumes(
    corpus: Path, tmp_path: Path, number: signal.Signals, ranks: int
) -> None:
    """Ctrl-C or SIGTERM: all ranks save the same step, and the run prints how to resume."""
    arguments = settings(corpus, tmp_path, *LONG, "checkpoint.save_interval=0")
    process = launch(ranks, arguments, ("--max-restarts=0",) if ranks > 1 else ())
    wait_for(lambda: steps_done(tmp_path) >= 3, process)
    process.send_signal(number)
    output = finish(process, expected=128 + number if ranks == 1 else 1)
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 128 + number
    assert f"run test stopped by {number.name}: step {report['step']} of 40" in output
    launcher = "python " if ranks == 1 else "torchrun --nproc-per-node 2 --max-restarts=0 "
    assert report["resume"].startswith(f"{launcher}{ROOT / 'train.py'} ")
    assert f"resume with\n  {report['resume']}\n" in output
    (saved,) = (tmp_path / "test" / "checkpoints").iterdir()
    assert saved.name == f"step_{report['step']:08d}"
    assert f"resuming from {saved}" in finish(start(ranks, arguments))
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 41))


def test_the_run_folder_has_the_promised_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no pickle and no secret; a finished or moved run resumes."""
    secrets = {name: f"planted-{name.lower()}-0123456789abcdef0123456789" for name in SECRETS}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    # Deterministic kernels are what a processor has anyway, so nothing changes.
    arguments = settings(corpus, tmp_path, "logging.wandb=offline", "debug.deterministic=true")
    finish(start(1, arguments))
    folder = tmp_path / "test"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "exit.json",
        "metrics.jsonl",
        "samples.jsonl",
        "tensorboard",
        "tokenizer.model",
        "wandb",
    }
    assert json.loads((folder / "exit.json").read_text())["code"] == 0
    (log,) = logs(folder)
    sent = [row["item"]["step"] for row in records(log, "history") if "train/loss" in row["item"]]
    assert sent == [1, 2, 3, 4, 5, 6]
    assert str(corpus).encode() not in log.read_bytes()
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert [name for name in SECRETS if secrets[name].encode() in content] == [], path
        if path.is_file() and "wandb" not in path.parts:
            start_of_file = path.read_bytes()[:2]
            assert start_of_file[:1] != b"\x80", f"{path} may be a pickle"
            assert start_of_file != b"PK", f"{path} may be torch's zip of pickles"
    assert "is finished" in finish(start(1, arguments))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6]
    folder.rename(tmp_path / "moved")
    extended = settings(corpus, tmp_path, "run.name=moved", "train.train_steps=7")
    assert "resuming from" in finish(start(1, extended))


def test_the_end_names_a_whole_checkpoint_and_more_steps(corpus: Path, tmp_path: Path) -> None:
    """Not a newer one that is damaged; the command to train on exceeds the steps of the run."""
    finish(start(1, settings(corpus, tmp_path)))
    checkpoints = tmp_path / "test" / "checkpoints"
    shutil.copytree(checkpoints / "step_00000006", checkpoints / "step_00000099")
    output = finish(start(1, settings(corpus, tmp_path, "train.train_steps=2")))
    assert f" {checkpoints / 'step_00000006'}\n" in output
    assert not re.search(r"^  checkpoint .*step_00000099", output, re.MULTILINE)
    assert re.findall(r"train\.train_steps=(\d+)$", output, re.MULTILINE) == ["12"]


def test_settings_that_may_not_change_are_refused(corpus: Path, tmp_path: Path) -> None:
    """A resume with another model, seed or global batch names the keys and changes nothing."""
    finish(start(1, settings(corpus, tmp_path)))
    files = sorted(path for path in (tmp_path / "test").rglob("*") if path.is_file())
    assert tmp_path / "test" / "exit.json" in files
    files.remove(tmp_path / "test" / ".lock")
    before = [path.read_bytes() for path in files]
    changes = ("model.num_layers=3", "train.global_batch_size=4", "run.seed=5")
    output = finish(start(1, settings(corpus, tmp_path, *changes)), expected=2)
    assert "Traceback" not in output
    for change in changes:
        assert f"{change} (was " in output
    too_long = settings(corpus, tmp_path, "run.resume=never", "model.seq_length=100000")
    output = finish(start(1, too_long), expected=2)
    assert "Traceback" not in output
    assert [path.read_bytes() for path in files] == before
    assert not list((tmp_path / "test").glob("previous_*"))


def test_another_text_is_refused_before_it_is_tokenized(corpus: Path, tmp_path: Path) -> None:
    """The content of its files counts, not their place: a moved folder resumes."""
    finish(start(1, settings(corpus, tmp_path, "run.stop_at_step=2")))
    shutil.copytree(corpus, tmp_path / "moved")
    moved = settings(corpus, tmp_path, f"data.path={tmp_path / 'moved'}")
    output = finish(start(1, [*moved, "run.stop_at_step=3", "optimizer.lr=0.02"]))
    assert "resuming from" in output
    assert "optimizer.lr=0.02 differs from the checkpoint's" in output
    assert "the schedule has changed" in output
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [1, 2, 3]
    (tmp_path / "moved" / "more.txt").write_text("one more text\n")
    cache = corpus.parent / "cache"
    before = sorted(path.name for path in cache.iterdir())
    output = finish(start(1, moved), expected=2)
    assert "the text of data.path or data.sources has changed since" in output
    shutil.copytree(tmp_path / "moved", tmp_path / "more")
    more = settings(corpus, tmp_path, f"data.path={tmp_path / 'more'}", "optimizer.lr=0.03")
    output = finish(start(1, more), expected=2)
    assert f"config={tmp_path / 'test' / 'config.yaml'}, or choose another run.name" in output
    assert "the schedule has changed" not in output  # it will not be used
    assert "Traceback" not in output
    output = finish(start(1, [*moved, "model.num_layers=3"]), expected=2)
    assert "cannot resume" in output
    assert "model.num_layers=3 (was 2)" in output
    assert sorted(path.name for path in cache.iterdir()) == before


def test_a_rank_that_crashes_alone_is_reported(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 waits for it in a collective; exit.json has the cause, not what followed."""
    inject(monkeypatch, tmp_path / "inject", 1, "raise KeyError('the cause')")
    output = finish(start(2, settings(corpus, tmp_path, *LONG)), expected=1)
    assert "KeyError: 'the cause'" in output
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["reason"] == "rank 1: KeyError: 'the cause'"
    assert (report["code"], report["step"]) == (1, 6)
    assert "train.py" in report["resume"]


def test_must_never_and_in_use(corpus: Path, tmp_path: Path) -> None:
    """`must` needs a checkpoint; a second writer is refused; `never` loses nothing."""
    arguments = settings(corpus, tmp_path, "train.train_steps=100000", "evaluate.interval=0")
    output = finish(start(1, [*arguments, "run.resume=must"]), expected=2)
    assert "run.resume=must, but there is no checkpoint in" in output
    first = start(1, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 3, first)
    output = finish(start(1, arguments), expected=2)
    assert f"is in use by process {first.pid} on " in output
    first.send_signal(signal.SIGTERM)
    finish(first, expected=143)
    kept = (tmp_path / "test" / "metrics.jsonl").read_bytes()
    finish(start(1, [*arguments, "run.resume=never", "run.stop_at_step=2"]))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    previous = tmp_path / "test" / "previous_1"
    assert (previous / "metrics.jsonl").read_bytes() == kept
    assert list((previous / "checkpoints").glob("step_*"))


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_compiled_kernels_resume_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """Even if the first rows after the resume have another length."""
    llama = ("model.normalization=RMSNorm", "model.position_embedding_type=rope")
    chains = ("train.compile=true", "model.activation=swiglu", "data.sequence_mode=pad", *llama)
    for name, stops in (("whole", [6]), ("parts", [2, 6])):
        for stop in stops:
            overrides = (*chains, f"run.name={name}", f"run.stop_at_step={stop}")
            finish(start(2, settings(corpus, tmp_path, *overrides)), limit_s=300)  # compiles
    parts, whole = (
        [r for r in rows(tmp_path, name) if "train/loss" in r] for name in ("parts", "whole")
    )
    assert parts == whole


def test_a_run_that_is_not_finite_ends(corpus: Path, tmp_path: Path) -> None:
    """With exit code 5, and without a save: earlier checkpoints stay."""
    finish(start(1, settings(corpus, tmp_path, "run.stop_at_step=2")))
    wild = settings(
        corpus,
        tmp_path,
        "optimizer.lr=1e30",
        "optimizer.clip_grad=0",
        "train.max_consecutive_skips=1",
        "train.max_rollbacks=1",
    )
    output = finish(start(1, wild), expected=5)
    assert "Traceback" not in output
    assert output.count("rolling back from step 5 to step 2 and skipping samples 16 to 39") == 1
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 5
    assert report["reason"].startswith(
        "step 5: 2 consecutive updates skipped after 1 rollback to step 2"
    )
    assert [path.name for path in (tmp_path / "test" / "checkpoints").iterdir()] == [
        "step_00000002"
    ]
