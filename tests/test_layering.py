"""Rules of the whole project: imports, communication, pickle, and the budgets of lines."""

import ast
from collections import Counter
from pathlib import Path

from configs.fields import KEYS
from tests.lines import (
    BESIDE,
    LEVELS,
    MAX_MODULES,
    PACKAGES,
    PROGRAMS,
    ROOT,
    budgets,
    imported_names,
    nodes,
    source_files,
)

# Name torch's process groups, for `parallel/` and for dry runs.
PRIVATE_TORCH = {Path("ops/torch_private.py"), Path("ops/torch_dry_run.py")}
# Outside `parallel/`: the types of distributed tensors, and the launcher's error reports.
NOT_COMMUNICATION = ("torch.distributed.tensor", "torch.distributed.elastic")
# Methods of distributed tensors that communicate.
COMMUNICATING_METHODS = {"full_tensor", "redistribute"}
PICKLING_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save"}
MAX_KEYS = 110
# What a step, an evaluation or a save of a run calls, beside `parallel` and `model`.
TRAINING = (
    "train.py",
    "checkpoints/save.py",
    *(
        f"training/{name}.py"
        for name in (
            "step",
            "evaluation",
            "checkpoint_writer",
            "optimizer",
            "signals",
            "divergence",
        )
    ),
)

SOURCES = source_files()


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_packages_import_only_what_is_below_them() -> None:
    """A package imports itself and the levels below; none imports a program, bench or the tests."""
    for file in SOURCES:
        package = file.parts[0]
        ours = {name.partition(".")[0] for name in imported_names(file)}
        ours &= {*PACKAGES, *PROGRAMS, "tests", "bench", "docs"}
        level = next((n for n, names in enumerate(LEVELS) if package in names), None)
        if level is not None:
            assert ours <= {package, *(name for below in LEVELS[:level] for name in below)}, file
        elif package in BESIDE:
            assert "tests" not in ours, file
            assert "bench" not in ours or package == "bench", file
        else:  # a program
            assert ours <= {*PACKAGES}, file


def test_the_tree_is_that_of_the_design() -> None:
    """Programs alone at the root, and folders that one can take in at a glance."""
    assert {file.stem for file in ROOT.glob("*.py")} == set(PROGRAMS)
    modules = Counter(file.parent for file in SOURCES if file.stem != "__init__")
    for folder, number in modules.items():
        assert number <= MAX_MODULES or folder.parts[0] in BESIDE, folder


def test_configs_know_no_torch() -> None:
    """A wrong setting is found before torch's two seconds of import."""
    for file in SOURCES:
        if file.parts[0] == "configs":
            assert not [name for name in imported_names(file) if name.partition(".")[0] == "torch"]


def test_only_parallel_communicates() -> None:
    """What crosses the wire is decided in `parallel/`, and nowhere else; not so other trainers."""
    for file in SOURCES:
        if file.parts[0] in ("parallel", "bench") or file in PRIVATE_TORCH:
            continue
        for name in imported_names(file):
            if name.startswith("torch.distributed"):
                assert name.startswith(NOT_COMMUNICATION), f"{file}: {name}"
        attributes = [node for node in nodes(file) if isinstance(node, ast.Attribute)]
        for name in map(_dotted, attributes):
            is_communication = name.startswith("torch.distributed.")
            assert not is_communication or name.startswith(NOT_COMMUNICATION), f"{file}: {name}"
        assert COMMUNICATING_METHODS.isdisjoint(node.attr for node in attributes)


def test_nothing_is_pickled() -> None:
    """Reading a file of ours or of a stranger never runs code in it."""
    for file in SOURCES:
        modules = {name.partition(".")[0] for name in imported_names(file)}
        assert modules.isdisjoint(PICKLING_MODULES), file
        assert "torch.distributed.checkpoint" not in ",".join(imported_names(file))
        for node in nodes(file):
            if isinstance(node, ast.Call):
                assert _dotted(node.func) not in PICKLING_CALLS, file
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), file


def test_training_waits_for_the_device_in_one_place() -> None:
    """The watchdog takes `move_to` for a wait; it cannot see one in `x.item()` or `x.cpu()`."""
    for file in SOURCES:
        in_training = file.parts[0] in ("parallel", "model") or str(file) in TRAINING
        if not in_training or file.name == "mesh.py":  # done before training
            continue
        for node in nodes(file):
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
