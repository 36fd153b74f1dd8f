"""Each classic mistake of tensor and sequence parallelism fails a test; see mistakes.py.

Measured on two idle cores: 76 s in all, of which the named tests without any mistake take 9 s, the
slips of the table 9 s and each of the 41 mistakes 0.7 to 3 s: torch is imported once and forked.
"""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lines import ROOT
from tests.mistakes import MISTAKES, Mistake
from tests.mutations import DOCUMENT, NO_TEST, TableError, document_row, plant


@pytest.fixture(scope="module")
def caught_by() -> Iterator[Callable[[str], str]]:
    """Return the verdict on a mistake by name; the program goes through the table in order."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.mutations"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed: list[str] = []

    def verdict(name: str) -> str:
        while not (found := [line for line in printed if f" s  {name} -> " in line]):
            line = process.stdout.readline()
            assert line, "".join(printed)
            printed.append(line)
        return found[0].rstrip("\n").partition(" -> ")[2]

    yield verdict
    process.send_signal(signal.SIGINT)  # if only some were asked for; it tidies up
    process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_named_tests_pass_without_a_mistake(caught_by: Callable[[str], str]) -> None:
    """Otherwise they would catch anything."""
    assert caught_by("nothing") == NO_TEST


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_caught(caught_by: Callable[[str], str], mistake: Mistake) -> None:
    """One of the tests that the table names fails, and docs/mutations.md says which."""
    test = caught_by(mistake.name)
    assert test.partition("[")[0] in {named.partition("[")[0] for named in mistake.tests}
    assert document_row(mistake, test) in DOCUMENT.read_text("utf-8")


def test_the_document_has_no_other_mistakes() -> None:
    """docs/mutations.md lists exactly the mistakes of the table."""
    rows = [line for line in DOCUMENT.read_text("utf-8").splitlines() if "::" in line]
    assert len(rows) == len(MISTAKES) == len({mistake.name for mistake in MISTAKES})


def test_the_table_quotes_the_code() -> None:
    """Each text occurs once in its file."""
    times = {m.name: (ROOT / m.file).read_text("utf-8").count(m.right) for m in MISTAKES}
    assert {name: number for name, number in times.items() if number != 1} == {}


@pytest.mark.parametrize(("text", "times"), [("a = 1\n", 0), ("a = 2\na = 2\n", 2)])
def test_a_text_that_has_moved_is_an_error(tmp_path: Path, text: str, times: int) -> None:
    """A text that does not occur exactly once is an error."""
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(TableError, match=f"its text is in code.py {times} times, not once"):
        plant(Mistake("two", "code.py", "a = 2", "a = 3", ()), tmp_path)
    assert (tmp_path / "code.py").read_text() == text


SLIPS = """
from tests.mistakes import Mistake
from tests.mutations import TableError, try_out

def verdict(wrong, test="test_row_equals_dense[True-tp1-dp1]", time_limit_s=60):
    right = "y = linear(x, weight)"
    test = "tests/parallel/test_layers.py::" + test
    try:
        return try_out(Mistake("x", "parallel/layers.py", right, wrong, (test,)), time_limit_s)
    except TableError as error:
        return str(error).splitlines()[0]

print(verdict("y = 0 * linear(x, weight)"))
print(verdict("y = weight =", "test_column_equals_dense"))
print(verdict("y = nobody_has_this_name"))
print(verdict("y = linear(x, weight)", "test_that_is_not_there"))
print(verdict("while True: pass", time_limit_s=3))
"""


@pytest.mark.slow
def test_only_a_failed_test_catches() -> None:
    """Syntax errors, undefined names, missing tests and timeouts are not failures of a test."""
    result = subprocess.run(
        [sys.executable, "-c", SLIPS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    caught, syntax, name, lost, late = result.stdout.splitlines()
    assert caught == "tests/parallel/test_layers.py::test_row_equals_dense[True-tp1-dp1]"
    assert syntax == "x: not a failed test but exit code 1"
    assert name == "x: not a failed test but exit code 1"
    assert lost == "x: not a failed test but exit code 4"
    assert late == "None"
