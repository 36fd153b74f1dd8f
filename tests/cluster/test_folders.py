"""Folders that hosts share or do not share: the run folder, the corpus, its tokens, Python."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, cluster_of, exit_report
from tests.runs import rows, settings

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture
def cluster(namespaces: None, tmp_path: Path) -> Iterator[Cluster]:
    """Two hosts."""
    with cluster_of(tmp_path, 2) as cluster:
        yield cluster


def run_settings(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    """A run over both hosts."""
    sizes = ("parallel.tensor_model_parallel_size=2", "evaluate.interval=0")
    return settings(corpus, directory, *sizes, *overrides)


def refusal(cluster: Cluster, directory: Path, arguments: list[str]) -> str:
    """Start a run that both hosts refuse with exit code 2; return what the first one prints."""
    outputs = [process.finish(expected=1) for process in cluster.torchrun(arguments, ranks=1)]
    # The launcher of the second host loses its store if that of the first one ends earlier.
    assert "exitcode  : 2" in outputs[0], outputs[0]
    assert "exitcode  : 2" in outputs[1] or "RendezvousConnectionError" in outputs[1], outputs[1]
    assert not (directory / "test" / "exit.json").exists()
    of_ranks, _, _ = outputs[0].partition("failed (exitcode")  # the rest is by torchrun
    assert "Traceback" not in of_ranks
    return of_ranks


def test_a_run_folder_of_each_host(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Each host has a disk of its own at the same path."""
    directory = tmp_path / "runs"
    directory.mkdir()
    cluster[1].hide(directory)
    output = refusal(cluster, directory, run_settings(corpus, directory))
    assert f"run.directory={directory} is not shared by all ranks: ranks [1] on node1 do" in output
    assert f"not see the folder {directory / 'test'} that rank 0 created on node0" in output


def test_tokens_of_each_host(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Hosts may each prepare the corpus, on a disk of their own, or share what one prepares."""
    curves = []
    for name in ("shared", "own"):
        cache = tmp_path / f"cache_{name}"
        cache.mkdir()
        if name == "own":
            cluster[1].hide(cache)
        arguments = run_settings(corpus, tmp_path, f"run.name={name}")
        for process in cluster.torchrun([*arguments, f"data.cache_directory={cache}"], ranks=1):
            process.finish()
        assert exit_report(tmp_path, name)["code"] == 0
        curves.append(rows(tmp_path, name))
        prepared = cluster[1].run("ls", cache) != ""
        assert prepared
    assert curves[0] == curves[1]


def test_another_text_on_one_host(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """The hosts are named."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "00.txt").write_text("another text\n")
    cluster[1].run("mount", "--bind", other, corpus)
    arguments = run_settings(corpus, tmp_path, f"data.cache_directory={tmp_path / 'cache'}")
    output = refusal(cluster, tmp_path, arguments)
    assert "the text of ranks [1] on node1 differs from that of rank 0 on node0; give" in output


def test_another_python_on_one_host(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """A module of its standard library, which data.source=python_stdlib trains on."""
    module = Path(sysconfig.get_path("stdlib"), "this.py")
    other = tmp_path / "this.py"
    other.write_text(module.read_text() + "# 3.11.99\n")
    cluster[1].run("mount", "--bind", other, module)
    arguments = run_settings(corpus, tmp_path, "data.source=python_stdlib", "data.path=null")
    output = refusal(cluster, tmp_path, arguments)
    assert "the text of ranks [1] on node1 differs from that of rank 0 on node0; give" in output
    assert "for data.source=python_stdlib the same Python" in output
