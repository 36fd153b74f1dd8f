"""What pytest needs to begin; the process that only hands out tests to workers imports no torch."""

from typing import Any

import pytest

# The second file uses a run that a fixture of the first has trained.
_SAME_WORKER = {
    "tests/test_evaluate.py": "tests/test_generate.py",
    "tests/test_restart.py": "tests/test_train.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make test` passes --sample."""
    help_text = "of each costly test, run the last case only, and no slow test"
    parser.addoption("--sample", action="store_true", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures and the selection where tests are collected."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.no_garbage")  # before the large imports
        config.pluginmanager.import_plugin("tests.plugin")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep files that share a trained run on one worker."""
    # Here, because the tests also run where the package is not installed.
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return _SAME_WORKER.get(path, path)

    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None
