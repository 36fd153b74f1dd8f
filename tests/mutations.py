"""Plants the mistakes of mistakes.py one at a time; the program behind `make mutations`.

A test that nothing makes fail holds nothing. Each mistake is planted in a copy of the sources, and
of the tests that it names, run there, at least one must fail.

    python -m tests.mutations           all mistakes, and the test that catches each
    python -m tests.mutations bias      those with "bias" in their name
    python -m tests.mutations --write   all, and docs/mutations.md anew

Most of a short test is the import of torch. So this process imports what the tests need from
others, and nothing of ours; it is then forked for each run of pytest, and that for each rank. A
fork knows the copy alone.
"""

import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.lines import PACKAGES, ROOT
from tests.mistakes import MISTAKES, Mistake

NO_TEST = "no test"
DOCUMENT = ROOT / "docs" / "mutations.md"
TIME_LIMIT_S = 100.0
# What takes long to import. Nothing is computed here: threads would not survive a fork.
_IMPORTED_ONCE = (
    "omegaconf",
    "safetensors.torch",
    "sentencepiece",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
)
# How a mistake fails that is no program; a real one runs, and gives something wrong.
_NO_PROGRAM = re.compile(r"\b(SyntaxError|NameError|UnboundLocalError|ImportError)\b")
_DOCUMENT_HEAD = """\
# Mistakes that the tests catch

Each mistake is planted in a copy of the sources, and the test beside it fails. Written by
`python -m tests.mutations --write` from the table in `tests/mistakes.py`; held by
`tests/test_mutations.py`.

| mistake | test that catches it |
|---|---|
"""


class TableError(Exception):
    """The table says what is not so, of the code or of the tests."""


def try_out(mistake: Mistake, time_limit_s: float = TIME_LIMIT_S) -> str | None:
    """Plant a mistake in a copy of the sources and run its tests there; returns the one that fails.

    Tests that give no answer in time have caught nothing. Raises TableError.
    """
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory).resolve()
        copy_sources(copy)
        plant(mistake, copy)
        code, output = run_tests(mistake.tests, copy, time_limit_s)
    if code in (pytest.ExitCode.OK, None):
        return None
    failed = re.search(r"^FAILED (.+?)(?: - .*)?$", output, re.MULTILINE)
    if code != pytest.ExitCode.TESTS_FAILED or failed is None or _NO_PROGRAM.search(output):
        raise TableError(f"{mistake.name}: not a failed test but exit code {code}\n{output}")
    return failed[1]


def copy_sources(copy: Path) -> None:
    """What the tests need, and nothing that could be large; without compiled files."""
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy2(file, copy)


def plant(mistake: Mistake, copy: Path) -> None:
    """Make the edit in the copy."""
    file = copy / mistake.file
    text = file.read_text("utf-8")
    if (times := text.count(mistake.right)) != 1:
        raise TableError(
            f"{mistake.name}: its text is in {mistake.file} {times} times, not once; "
            f"let tests/mistakes.py follow the code\n{mistake.right}"
        )
    file.write_text(text.replace(mistake.right, mistake.wrong), "utf-8")


def run_tests(tests: Sequence[str], copy: Path, time_limit_s: float) -> tuple[int | None, str]:
    """pytest's exit code (None: no end in time) and output, of these tests in the copy."""
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    output = copy / "output"
    output.touch()
    process = multiprocessing.get_context("fork").Process(
        target=_pytest, args=(tests, copy, output)
    )
    process.start()
    try:
        process.join(time_limit_s)
        code = process.exitcode
    finally:  # after Ctrl-C too; and its ranks, if any is left
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code, output.read_text("utf-8")


def _pytest(tests: Sequence[str], copy: Path, output: Path) -> None:
    """In the fork: forget this tree, take the copy for the project, and end with pytest's code."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(copy)
    tempfile.tempdir = str(copy)
    os.environ.pop("PYTEST_ADDOPTS", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    distributed: Any = importlib.import_module("tests.distributed")
    distributed.start_method = partial(multiprocessing.get_context, "fork")
    distributed.TIME_LIMIT_S = 60.0  # less than TIME_LIMIT_S of this module
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--color=no", *tests])
    for rank in multiprocessing.active_children():  # one that has trained does not heed SIGTERM
        rank.kill()
    sys.exit(code)


def nothing(mistakes: Sequence[Mistake]) -> Mistake:
    """No mistake at all: the named tests must pass, or they would catch anything."""
    tests = dict.fromkeys(test for mistake in mistakes for test in mistake.tests)
    return Mistake("nothing", "train.py", "def main(", "def main(", tuple(tests))


def document_row(mistake: Mistake, caught_by: str) -> str:
    """The line of docs/mutations.md for a mistake."""
    return f"| {mistake.name} | `{caught_by.removeprefix('tests/')}` |\n"


def verdict(mistake: Mistake) -> str:
    """Try a mistake out and print what came of it; returns the test that catches it, or why not."""
    started_at, details = time.perf_counter(), ""
    try:
        result = try_out(mistake) or NO_TEST
    except TableError as error:
        result, details = "an error of the table", f"{error}\n"
    elapsed_s = time.perf_counter() - started_at
    # One line, at once: who reads it, a person or test_mutations.py, is waiting.
    sys.stdout.write(f"{elapsed_s:5.1f} s  {mistake.name} -> {result}\n{details}")
    sys.stdout.flush()
    return result


def main(arguments: list[str]) -> int:
    """Print what catches each mistake; the exit code is 1 if one is not caught."""
    write = arguments == ["--write"]
    word = "" if write else " ".join(arguments)
    chosen = [mistake for mistake in MISTAKES if word in mistake.name]
    if not chosen:
        sys.stdout.write(f"no mistake has {word!r} in its name\n")
        return 1
    if verdict(nothing(chosen)) != NO_TEST:
        sys.stdout.write("a named test fails without any mistake: mend that first\n")
        return 1
    caught = {
        mistake: result for mistake in chosen if (result := verdict(mistake)).startswith("tests/")
    }
    sys.stdout.write(f"{len(caught)} of {len(chosen)} mistakes are caught\n")
    if write and len(caught) == len(chosen):
        DOCUMENT.parent.mkdir(exist_ok=True)
        rows = [document_row(mistake, test) for mistake, test in caught.items()]
        DOCUMENT.write_text(_DOCUMENT_HEAD + "".join(rows), "utf-8")
    return int(len(caught) < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
