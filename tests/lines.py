"""The line budgets of the project, and the program behind `make lines`.

The import closure is every module of ours that train.py imports, directly or not, lazily imported
ones included. The reading path is what a newcomer reads in one evening. All lines count.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the bottom: a package may import those of the levels below its own, and no program.
LEVELS = (
    ("configs", "ops"),
    ("parallel", "data"),
    ("model", "checkpoints"),
    ("training",),
    ("tracking",),
    ("interop", "planning"),
)
PACKAGES = tuple(package for level in LEVELS for package in level)
PROGRAMS = ("train", "generate", "evaluate", "export", "import_hf", "plan")
MAX_MODULES = 14  # of a folder, `__init__.py` not counted
BESIDE = ("bench", "docs", "tests")  # folders without that limit
# What is there now. The goal is 9,500 with context and pipeline parallelism.
CLOSURE_BUDGET = 12_977
READING_PATH_BUDGET = 3_000
_READING_PATH = ("train.py", "model/**/*.py", "parallel/mesh.py", "parallel/mappings.py")
_READING_PATH += ("parallel/layers.py", "parallel/loss.py", "parallel/context.py")
_READING_PATH += ("parallel/pipeline.py", "configs/weights.py")


@dataclass(frozen=True)
class Budget:
    """The lines of a set of files, and how many they may have."""

    name: str
    files: frozenset[Path]  # relative to the root
    allowed: int

    @property
    def lines(self) -> int:
        """Lines of all files, comments and blank lines included."""
        return sum(count_lines(file) for file in self.files)


def count_lines(file: Path) -> int:
    """Lines of a file given relative to the root."""
    return len((ROOT / file).read_text("utf-8").splitlines())


def source_files() -> list[Path]:
    """The project's own source files, without tests, relative to the root."""
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "bench").rglob("*.py"),
        *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py")),
    ]
    return sorted(file.relative_to(ROOT) for file in files)


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All nodes of the syntax tree of a file."""
    return tuple(ast.walk(ast.parse((ROOT / file).read_text("utf-8"))))


def imported_names(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, wherever in it; an imported name counts as a module."""
    package = ".".join(file.parts[:-1])
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}" if node.level else node.module or ""
            yield from (f"{module}.{alias.name}" for alias in node.names)


def import_closure(program: Path) -> frozenset[Path]:
    """Files of ours that a program imports, directly or not, and the program itself."""
    files, found = [program], {program}
    while files:
        for name in imported_names(files.pop()):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                module = Path(*parts[:end])
                for file in (module.with_suffix(".py"), module / "__init__.py"):
                    if file not in found and (ROOT / file).is_file():
                        found.add(file)
                        files.append(file)
    return frozenset(found)


def budgets() -> list[Budget]:
    """Every budget of the project."""
    path = (file.relative_to(ROOT) for pattern in _READING_PATH for file in ROOT.glob(pattern))
    return [
        Budget("import closure of train.py", import_closure(Path("train.py")), CLOSURE_BUDGET),
        Budget("reading path", frozenset(path), READING_PATH_BUDGET),
    ]


def main() -> int:
    """Print each budget with its files; the exit code is 1 if one is exceeded."""
    for budget in budgets():
        for file in sorted(budget.files):
            sys.stdout.write(f"  {count_lines(file):5}  {file}\n")
    for budget in budgets():
        over = "  over budget" if budget.lines > budget.allowed else ""
        sys.stdout.write(
            f"{budget.name}: {budget.lines} of {budget.allowed} lines in "
            f"{len(budget.files)} files{over}\n"
        )
    return int(any(budget.lines > budget.allowed for budget in budgets()))


if __name__ == "__main__":
    sys.exit(main())
