"""The budget of lines of each file, and the program behind `make lines`.

Files grow a few lines at a time until nobody reads them. When a budget is hit, something leaves or
moves; the budget does not grow in the same commit.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "parallel", "data", "model", "checkpoints")

_DEFAULT = 300
_TEST = 400
_PROGRAM = 200  # a program tells one story, on a few screens
_EXCEPTIONS = {
    "train.py": _PROGRAM,
    "generate.py": _PROGRAM,
    "evaluate.py": _PROGRAM,
    "export.py": _PROGRAM,
    "import_hf.py": _PROGRAM,
    "plan.py": _PROGRAM,
    "dashboard.py": _PROGRAM,
}


def source_files() -> list[Path]:
    """Returns the project's own source files, without tests, relative to the root."""
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "bench").rglob("*.py"),
        *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py")),
    ]
    return sorted(file.relative_to(ROOT) for file in files)


def line_counts() -> Iterator[tuple[Path, int, int]]:
    """Yields each Python file, tests too, with its lines and its budget."""
    tests = sorted(file.relative_to(ROOT) for file in (ROOT / "tests").rglob("*.py"))
    for file in (*source_files(), *tests):
        default = _TEST if file.parts[0] == "tests" else _DEFAULT
        budget = _EXCEPTIONS.get(file.as_posix(), default)
        yield file, len((ROOT / file).read_text("utf-8").splitlines()), budget


def main() -> int:
    """Prints the table; the exit code is 1 if a file is over its budget."""
    counts = list(line_counts())
    for file, lines, budget in counts:
        over = "  over its budget" if lines > budget else ""
        sys.stdout.write(f"{lines:5} / {budget}  {file}{over}\n")
    sys.stdout.write(f"{sum(lines for _, lines, _ in counts):5} in all\n")
    return int(any(lines > budget for _, lines, budget in counts))


if __name__ == "__main__":
    sys.exit(main())
