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


def losses(directory: Path) -> list[float]:
    return [row["train/loss"] for row in rows(directory)]


def run_settings(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    """Six steps whose micro-batches divide on every layout."""
    common = ("train.micro_batch_size=1", "evaluate.interval=0", "run.hang_timeout_s=60")
    return settings(corpus, directory, *common, *overrides)


def expect_the_losses_of_one_rank(corpus: Path, directory: Path) -> None:
    train_on(ONE_RANK, run_settings(corpus, directory / "one"))
    assert len(losses(directory)) == 6
    assert losses(directory) == pytest.approx(losses(directory / "one"), rel=2e-6)


def launch(cluster: Cluster, arguments: list[str], ranks: int = 2) -> None:
    for process in cluster.torchrun(arguments, ranks=ranks):
        process.finish()


@pytest.mark.timeout(300)
def test_two_hosts_train_as_one(namespaces: None, corpus: Path, tmp_path: Path) -> None:
    """One rank on each, tp=2, over their network."""
    with cluster_of(tmp_path, 2) as cluster:
        sizes = "parallel.tensor_model_parallel_size=2"
        launch(cluster, run_settings(corpus, tmp_path, sizes), ranks=1)
    expect_the_losses_of_one_rank(corpus, tmp_path)


@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_hosts", [2, 4])
@pytest.mark.parametrize("sizes", LAYOUTS, ids=lambda sizes: sizes[-1])
def test_layouts_over_hosts(
    namespaces: None, corpus: Path, tmp_path: Path, num_hosts: int, sizes: tuple[str, ...]
) -> None:
    """Two ranks on each host: tp=2 x dp, tp=2 x pp=2 (x dp), cp=2 x dp."""
    with cluster_of(tmp_path, num_hosts) as cluster:
        overrides = (f"parallel.{size}" for size in sizes)
        launch(cluster, run_settings(corpus, tmp_path, *overrides))
    expect_the_losses_of_one_rank(corpus, tmp_path)


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_printed_command_resumes(namespaces: None, corpus: Path, tmp_path: Path) -> None:
    """On all hosts, as printed and as in exit.json, with the options of the rendezvous."""
    stopping = ("run.stop_at_step=3", "parallel.tensor_model_parallel_size=2")
    with cluster_of(tmp_path, 2) as cluster:
        first, second = cluster.torchrun(run_settings(corpus, tmp_path, *stopping), ranks=1)
        output, _ = first.finish(), second.finish()
        command = exit_report(tmp_path)["resume"]
        assert "--rdzv-backend=c10d --rdzv-id=test --rdzv-endpoint=node0:" in command
        assert f"resume with\n  {command}\n" in output
        for process in cluster.everywhere(command):
            process.finish()
    expect_the_losses_of_one_rank(corpus, tmp_path)
