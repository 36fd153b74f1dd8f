"""The folder of a run against surroundings that are not as they should be."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import Config, RunConfig, UserError
from parallel import Mesh
from run_folder import RunFolder
from tests.distributed import ONE_RANK, Layout, distributed


def config(directory: Path) -> Config:
    return dataclasses.replace(Config(), run=RunConfig(name="test", directory=str(directory)))


@distributed(ONE_RANK, Layout(dp=2))
@pytest.mark.parametrize(
    "name", ["", "checkpoints", "metrics.jsonl", "samples.jsonl", "profile", ".lock"]
)
def test_a_link_is_refused_and_what_it_leads_to_left_alone(
    mesh: Mesh, tmp_path: Path, name: str
) -> None:
    """On all ranks, naming link and target; nothing is written or deleted there."""
    victim, path = tmp_path / "victim", tmp_path / "test" / name
    if mesh.world.rank == 0:
        if name in ("", "checkpoints"):
            victim.mkdir()
            (victim / ".tmp-step_00000001").mkdir()
        else:
            victim.write_text("precious")
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(victim)
    with (
        pytest.raises(UserError, match=r"is a symbolic link to .*victim"),
        RunFolder(config(tmp_path), mesh),
    ):
        pass
    if victim.is_dir():
        assert [entry.name for entry in victim.iterdir()] == [".tmp-step_00000001"]
    else:
        assert victim.read_text() == "precious"


@distributed(ONE_RANK, Layout(dp=2))
def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(
    mesh: Mesh, tmp_path: Path
) -> None:
    """Said before training; here a file is where the folder should be."""
    if mesh.world.rank == 0:
        (tmp_path / "test").write_text("")
    with pytest.raises(UserError, match=r"cannot write in run folder .*test: (Not|File)"):
        RunFolder(config(tmp_path), mesh).__enter__()


@distributed(ONE_RANK)
def test_links_elsewhere_are_nobodys_business(mesh: Mesh, tmp_path: Path) -> None:
    """run.directory itself may be one, to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with RunFolder(config(tmp_path / "runs"), mesh) as folder:
        folder.write_exit(0, "finished")
    report = json.loads((tmp_path / "disk" / "test" / "exit.json").read_text())
    assert report["code"] == 0
