"""Training on several hosts gives the losses of one host."""

from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, cluster_of, exit_report
from tests.distributed import ONE_RANK
from tests.runs import rows, settings, train_on

LAYOUTS = [
    ("tensor_model_parallel_size=2",),
    ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"),
    ("context_parallel_size=2",),
]


def expect_the_losses_of_one_rank(corpus: Path, directory: Path, cluster: Cluster, *sizes: str):
    """Train on two ranks of each host, and the same run on one rank here."""
    common = ("train.micro_batch_size=1", "evaluate.interval=0")
    arguments = settings(corpus, directory, *common, *(f"parallel.{size}" for size in sizes))
    for process in cluster.torchrun(arguments):
        process.finish()
    train_on(ONE_RANK, settings(corpus, directory / "one", *common))
    losses, expected = (
        [row["train/loss"] for row in rows(folder)] for folder in (directory, directory / "one")
    )
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=2e-6)


@pytest.mark.timeout(300)
def test_two_hosts_train_as_one(namespaces: None, corpus: Path, tmp_path: Path) -> None:
    """One rank on each, tp=2, over their network; the printed command resumes the run."""
    arguments = settings(corpus, tmp_path, "run.stop_at_step=3", "evaluate.interval=0")
    arguments.append("parallel.tensor_model_parallel_size=2")
    with cluster_of(tmp_path, 2) as cluster:
        for process in cluster.torchrun(arguments, ranks=1):
            process.finish()
        command = exit_report(tmp_path)["resume"]
        assert "--rdzv-backend=c10d --rdzv-id=test --rdzv-endpoint=node0:" in command
        for process in cluster.everywhere(command):
            process.finish()
    train_on(ONE_RANK, settings(corpus, tmp_path / "one", "evaluate.interval=0"))
    losses, expected = (
        [row["train/loss"] for row in rows(folder)] for folder in (tmp_path, tmp_path / "one")
    )
    assert losses == pytest.approx(expected, rel=1e-5)  # resumed with the launch's own threads


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_hosts", [2, 4])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: sizes[-1])
def test_layouts_over_hosts(
    namespaces: None, corpus: Path, tmp_path: Path, num_hosts: int, sizes: tuple[str, ...]
) -> None:
    """Two ranks on each host: tp=2 x dp, tp=2 x pp=2 x dp, cp=2 x dp."""
    with cluster_of(tmp_path, num_hosts) as cluster:
        expect_the_losses_of_one_rank(corpus, tmp_path, cluster, *sizes)
