"""Hosts and Slurm for tests, which skip with the reason where a machine cannot have them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import missing_for_hosts
from tests.cluster.slurm import Slurm, missing_for_slurm, slurm_on


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skip where hosts cannot be made."""
    if (reason := missing_for_hosts()) is not None:
        pytest.skip(reason)


@pytest.fixture
def slurm(namespaces: None, tmp_path: Path) -> Iterator[Slurm]:
    """Slurm on two hosts."""
    if (reason := missing_for_slurm()) is not None:
        pytest.skip(reason)
    with slurm_on(tmp_path, 2) as running:
        yield running
