"""Rules of the whole project: imports, communication, pickle, and the budgets of lines."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.fields import KEYS
from tests.lines import PACKAGES, ROOT, budgets, imported_names, source_files

# What each package may import of ours; programs and modules beside them may import everything.
ALLOWED = {
    "configs": set(),
    "parallel": set(),
    "data": {"configs"},
    "model": {"parallel", "configs"},
    "checkpoints": {"parallel", "configs"},
}
# Outside `parallel/`: the types of distributed tensors, and the launcher's error reports.
NOT_COMMUNICATION = ("torch.distributed.tensor", "torch.distributed.elastic")
# Methods of distributed tensors that communicate.
COMMUNICATING_METHODS = {"full_tensor", "redistribute"}
PICKLING_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save"}
MAX_KEYS = 110
# What a step, an evaluation or a save of a run calls, beside `parallel` and `model`.
TRAINING = (
    "train",
    "evaluation",
    "saving",
    "optimizer",
    "stopping",
    "bad_numbers",
    "audit",
    "save",
)

sources = pytest.mark.parametrize("file", source_files(), ids=str)


def _nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / file).read_text("utf-8")))


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@sources
def test_packages_import_only_what_is_below_them(file: Path) -> None:
    """A package imports itself and what the table allows; none imports a program or the tests."""
    package = file.parts[0] if file.parts[0] in PACKAGES else None  # else a program
    ours = {name.partition(".")[0] for name in imported_names(file)}
    assert "tests" not in ours
    assert "bench" not in ours or file.parts[0] == "bench"
    if package is not None:
        programs = {path.stem for path in ROOT.glob("*.py")}
        ours &= {*PACKAGES, *programs}
        assert ours <= {package, *ALLOWED[package]}


@sources
def test_configs_know_no_torch(file: Path) -> None:
    """A wrong setting is found before torch's two seconds of import."""
    if file.parts[0] == "configs":
        assert not [name for name in imported_names(file) if name.partition(".")[0] == "torch"]


@sources
def test_only_parallel_communicates(file: Path) -> None:
    """What crosses the wire is decided in `parallel/`, and nowhere else; not so other trainers."""
    if file.parts[0] in ("parallel", "bench"):
        return
    for name in imported_names(file):
        if name.startswith("torch.distributed"):
            assert name.startswith(NOT_COMMUNICATION), name
    attributes = [node for node in _nodes(file) if isinstance(node, ast.Attribute)]
    dotted = [name for name in map(_dotted, attributes) if name.startswith("torch.distributed.")]
    assert [name for name in dotted if not name.startswith(NOT_COMMUNICATION)] == []
    assert COMMUNICATING_METHODS.isdisjoint(node.attr for node in attributes)


@sources
def test_nothing_is_pickled(file: Path) -> None:
    """Reading a file of ours or of a stranger never runs code in it."""
    modules = {name.partition(".")[0] for name in imported_names(file)}
    assert modules.isdisjoint(PICKLING_MODULES)
    assert "torch.distributed.checkpoint" not in ",".join(imported_names(file))
    for node in _nodes(file):
        if isinstance(node, ast.Call):
            assert _dotted(node.func) not in PICKLING_CALLS
        assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle")


@sources
def test_training_waits_for_the_device_in_one_place(file: Path) -> None:
    """The watchdog takes `move_to` for a wait; it cannot see one in `x.item()` or `x.cpu()`."""
    in_training = file.parts[0] in ("parallel", "model") or file.stem in TRAINING
    if not in_training or file.name == "mesh.py":  # done before training
        return
    for node in _nodes(file):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in ("item", "cpu"):
            tensor = node.func.value
            is_moved = isinstance(tensor, ast.Call) and _dotted(tensor.func) == "move_to"
            assert is_moved, f"{file}:{node.lineno}"
        assert node.func.attr != "synchronize" or file.name == "collectives.py"


def test_budgets_of_lines_hold() -> None:
    """See tests/lines.py; `make lines` prints the files of each budget."""
    for budget in budgets():
        assert budget.lines <= budget.allowed, budget.name


def test_settings_keep_to_their_budget() -> None:
    """A new key must be worth an old one once there are 110."""
    assert len(KEYS) <= MAX_KEYS
