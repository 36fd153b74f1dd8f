"""What several files of tests begin with."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import DEVICE, ONE_RANK
from tests.fork_server import begin_to_collect_garbage
from tests.runs import LONG, finish, rows, settings, start
from tests.trained_runs import FAMILIES, train_family

# Fixtures of tests that start ranks or programs; each of their cases takes seconds.
_COSTLY = {"layout", "corpus", "runs", "unbroken"}
# The tests of `make test-gpu`, besides those of what only a GPU has.
_ON_GPUS = (
    *("parallel/", "model/", "checkpoints/", "training/test_resume", "test_golden"),
    "ops/test_segments",
)
_CPU_ONLY = tuple(
    f"parallel/test_{name}" for name in ("data_parallel", "rendezvous", "shared_memory")
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the tests of `make test` or `make test-gpu`; files that take long come first."""
    if DEVICE == "cuda":
        _keep(config, items, [item for item in items if _runs_on_a_gpu(item)])
    if config.getoption("sample"):
        _sample(config, items)
    num_costly = Counter(item.path for item in items if _is_costly(item))
    size = {path: path.stat().st_size for path in {item.path for item in items}}
    items.sort(key=lambda item: (-num_costly[item.path], -size[item.path]))


def pytest_collection_finish() -> None:
    """All imports are done."""
    begin_to_collect_garbage()


def _is_costly(item: pytest.Item) -> bool:
    return bool(_COSTLY & set(getattr(item, "fixturenames", ())))


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = []
    for of_one_test in cases.values():
        # Lists of layouts end with a large one.
        chosen += of_one_test[-1:] if _is_costly(of_one_test[0]) else of_one_test
    _keep(config, items, chosen)


def _runs_on_a_gpu(item: pytest.Item) -> bool:
    """Whether a test is about GPUs, or about code that both run, on ranks that can have a GPU."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    layout = parameters.get("layout", ONE_RANK)
    path = str(item.path.relative_to(Path(__file__).parent))
    on_both = path.startswith(_ON_GPUS) and not path.startswith(_CPU_ONLY)
    return bool(item.get_closest_marker("gpu")) or (on_both and layout.has_devices())


def _keep(config: pytest.Config, items: list[pytest.Item], chosen: list[pytest.Item]) -> None:
    left_out = set(items) - set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


WORDS = ["def", "return", "self", "import", "class", "for", "while", "if", "else", "None", "True"]


def write_corpus(folder: Path) -> None:
    """Forty documents of very different length."""
    folder.mkdir(exist_ok=True)
    for number in range(40):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(3 + 11 * number)]
        lines = [" ".join(words[i : i + 6]) for i in range(0, len(words), 6)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + f"\n# {number}\n")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those documents, and a place for their tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run of forty steps, `LONG`, that nothing happens to."""
    directory = tmp_path_factory.mktemp("unbroken")
    finish(start(2, settings(corpus, directory, *LONG)))
    return rows(directory)


@pytest.fixture(scope="session")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run of each family, written on 2 x 2 ranks."""
    return {
        family: train_family(corpus, tmp_path_factory.mktemp(family), family) for family in FAMILIES
    }
