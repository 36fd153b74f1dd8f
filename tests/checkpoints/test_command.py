"""`python -m checkpoints`: listing, verifying and describing."""

import json
import shutil
from pathlib import Path

import pytest

import checkpoints.__main__ as command
from checkpoints import Checkpoint
from checkpoints.__main__ import main
from parallel import Mesh
from tests.checkpoints.test_checkpoints import flip, make_tensors, save_checkpoint
from tests.distributed import Layout, run_on

STATE = {
    "progress": {"step": 3, "tokens": 4096},
    "config": {"model.num_layers": 2},
}


def save_two(mesh: Mesh, folder: Path) -> None:
    for step in (3, 4):
        tensors = {f"parameters.{name}": t for name, t in make_tensors(mesh, step).items()}
        tensors["exp_avg.norm"] = make_tensors(mesh, step)["norm"]
        save_checkpoint(folder, step, tensors, STATE, mesh, keep=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints of two ranks."""
    run_on(Layout(tp=2), save_two, folder=tmp_path / "checkpoints")
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines of output, and errors."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_intact_checkpoints_are_listed_and_verified(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, oldest first; only verify=true reports them as verified."""
    unverified = "checksums not verified (verify=true)"
    for arguments, word in ((), unverified), (("verify=true",), "verified"):
        code, lines, _ = answer(capsys, f"run={run}", *arguments)
        assert code == 0
        assert [line.split()[0] for line in lines] == ["step_00000003", "step_00000004"]
        assert all(line.endswith(f"MiB in 2 files  4,096 tokens  {word}") for line in lines)


def test_damage_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit is found with verify=true, a missing file or bad manifest without it."""
    newest = run / "checkpoints" / "step_00000004"
    flip(newest / "rank_00001.safetensors")
    assert answer(capsys, f"run={run}")[0] == 0
    code, lines, _ = answer(capsys, f"run={run}", "verify=true")
    assert code == 1
    assert lines[0].endswith("verified")
    assert lines[1].endswith(
        "DAMAGED: rank_00001.safetensors does not match its checksum in parameters.columns"
    )
    (newest / "rank_00001.safetensors").unlink()
    code, lines, _ = answer(capsys, f"run={run}")
    assert (code, lines[1].endswith("DAMAGED: rank_00001.safetensors is missing")) == (1, True)
    flip(newest / "manifest.json")
    code, lines, _ = answer(capsys, f"run={run}", "step=4")
    assert code == 1
    assert lines[0].startswith("step_00000004  DAMAGED: manifest.json ")


def test_a_checkpoint_is_described(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Progress, settings and tensors: (13 + 12 + 2) x 6 + 5 x 11 + 7 + 9 elements."""
    code, lines, _ = answer(capsys, f"run={run}", "step=3")
    assert code == 0
    assert lines[0].startswith("step_00000003")
    assert "  tokens: 4096" in lines
    assert "  model.num_layers: 2" in lines
    assert "parameters: 233 elements in 6 tensors" in lines
    assert "exp_avg: 7 elements in 1 tensor" in lines
    assert "  rows  float32 [13, 6] in 2 shards" in lines
    assert "  norm  float32 [7]" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "run=RUN is required: the folder of a run, such as runs/gpt_debug"),
        (("run={run}", "verify=yes"), "verify=yes is not true or false"),
        (("run={run}", "step=-1"), "step=-1 is out of range; it must be at least 0"),
        (("run={run}", "step=5"), "step=5 has no checkpoint; there are checkpoints of steps 3, 4"),
        (("run={run}", "stop=5"), "stop=5: there is no key stop; did you mean step?"),
        (("run=/nowhere",), "run=/nowhere has no checkpoints in /nowhere/check"),
    ],
)
def test_invalid_arguments_are_explained(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    """Each is one line, with exit code 2."""
    with pytest.raises(SystemExit, match="2"):
        main([argument.format(run=run) for argument in arguments])
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help prints all settings; the exit code is 0."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    output = capsys.readouterr().out
    assert output.startswith("Usage: python -m checkpoints key=value ...\n")
    assert all(f"  {key}  (" in output for key in ("run", "verify", "step"))


def test_a_checkpoint_deleted_meanwhile_is_not_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run prunes while the program reads."""
    verify = command.verify_file

    def prune(checkpoint: Checkpoint, name: str) -> None:
        if checkpoint.step == 3:
            shutil.rmtree(checkpoint.directory, ignore_errors=True)
        verify(checkpoint, name)

    monkeypatch.setattr(command, "verify_file", prune)
    code, lines, _ = answer(capsys, f"run={run}", "verify=true")
    assert code == 0
    assert lines[0] == "step_00000003  deleted by the run"
    assert lines[1].endswith("verified")


def test_if_all_are_deleted_the_newer_one_is_read(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpoint.keep=1 a run replaces its only checkpoint."""
    verify, checkpoints = command.verify_file, run / "checkpoints"
    (checkpoints / "step_00000004").rename(run / "step_00000004")

    def overtake(checkpoint: Checkpoint, name: str) -> None:
        if checkpoint.step == 3 and (run / "step_00000004").exists():
            (run / "step_00000004").rename(checkpoints / "step_00000004")
            shutil.rmtree(checkpoint.directory)
        verify(checkpoint, name)

    monkeypatch.setattr(command, "verify_file", overtake)
    code, lines, _ = answer(capsys, f"run={run}", "verify=true")
    assert code == 0
    assert lines[0] == "step_00000003  deleted by the run"
    assert lines[1].startswith("step_00000004")
    assert lines[1].endswith("verified")


def test_the_command_changes_no_file(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([f"run={run}", "verify=true"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert json.loads((run / "checkpoints/step_00000003/manifest.json").read_text())["step"] == 3
