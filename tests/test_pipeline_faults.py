"""Faults of a pipeline: lost, stopped and interrupted stages, bad steps, and failed saves."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from configs import Config, parse_config
from parallel import Mesh
from tests.distributed import ONE_RANK, Layout, distributed, run_on
from tests.parallel.test_replica_check import flip_a_bit
from tests.runs import LONG, finish, ranks_of, rows, settings, start, steps_done, wait_for
from tests.training.test_checkpoint_writer import (
    test_a_failed_save_is_reported_and_the_next_one_works as a_failed_save_is_reported,
)
from tests.training.test_divergence import changed, forced_skip, poisoned, run
from tests.training.test_watchdog import (
    STUCK,
    WATCHED,
    hang_report,
    inject,
    stop_in_the_middle,
)
from train import start as start_run
from training.divergence import ReplicaMismatchError, check_replicas
from training.optimizer import weight_tensors
from training.run_folder import RunFolder

UNTIED = ("model.num_layers=5", "model.untie_embeddings_and_output_weights=true")


def stages(number: int) -> tuple[str, ...]:
    """The settings of a long run on this many stages."""
    layout = f"parallel.pipeline_model_parallel_size={number}"
    split = ("parallel.tensor_model_parallel_size=1", layout, "train.micro_batch_size=2")
    return (*LONG, *UNTIED, *split)


def each_stage(*drilled: int) -> list[Any]:
    """(stages, the stage with the fault): of two stages always, of more in `make drills`."""
    drills = [(number, stage) for number in drilled for stage in range(number)]
    return [(2, 0), (2, 1), *(pytest.param(*case, marks=pytest.mark.drill) for case in drills)]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run of forty steps on two stages, to which nothing happens."""
    directory = tmp_path_factory.mktemp("whole")
    finish(start(2, settings(corpus, directory, *stages(2))))
    return rows(directory)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "stage"), each_stage(3, 4))
def test_a_killed_stage_loses_nothing(
    corpus: Path, tmp_path: Path, whole: list[dict[str, Any]], number: int, stage: int
) -> None:
    """kill -9 of any stage; torchrun restarts all, and the run has the bits of one unbroken."""
    arguments = settings(corpus, tmp_path, *stages(number))
    process = start(number, arguments, ("--max-restarts=1",))
    wait_for(lambda: steps_done(tmp_path) >= 12, process)
    os.kill(ranks_of(tmp_path)[stage], signal.SIGKILL)
    output = finish(process)
    assert output.count("resuming from") == 1
    assert "step 40 of 40" in output
    if number == 2:
        assert "2 = tp 1 x pp 2 (layers of each stage: 3, 2)" in output
    assert rows(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "stage"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGINT, None)]
)
def test_a_signal_stops_all_stages_at_one_step(
    corpus: Path,
    tmp_path: Path,
    whole: list[dict[str, Any]],
    number: signal.Signals,
    stage: int | None,
) -> None:
    """Sent to one stage, or to all; they save the same step, and the run resumes."""
    arguments = settings(corpus, tmp_path, *stages(2))
    process = start(2, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 2, process)
    for rank, pid in ranks_of(tmp_path).items():
        if stage in (rank, None):
            os.kill(pid, number)
    output = finish(process, expected=1)
    report = json.loads((tmp_path / "test" / "exit.json").read_text())
    assert report["code"] == 128 + number, output
    assert report["step"] < 40
    saved = sorted((tmp_path / "test" / "checkpoints").iterdir())[-1]
    assert saved.name == f"step_{report['step']:08d}"
    assert "resuming from" in finish(start(2, arguments))
    assert rows(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("number", "stage"), each_stage(3))
def test_a_stopped_stage_is_named(corpus: Path, tmp_path: Path, number: int, stage: int) -> None:
    """SIGSTOP: neither a stage that waits for its messages nor any other is blamed."""
    process = start(number, settings(corpus, tmp_path, *WATCHED, *stages(number)))
    stopped = stop_in_the_middle(process, tmp_path, stage)
    finish(process, expected=1)
    reason = hang_report(tmp_path)
    assert f"process {stopped}) has stopped answering" in reason
    assert reason.count("(host ") == 1


@pytest.mark.drill
@pytest.mark.parametrize(("number", "stage"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_stuck_stage_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, stage: int
) -> None:
    """It answers but reads no batch; the others wait in a receive or in the sum of the step."""
    inject(monkeypatch, tmp_path / "inject", stage, STUCK)
    process = start(number, settings(corpus, tmp_path, *WATCHED, *stages(number)))
    finish(process, expected=1, limit_s=100)
    reason = hang_report(tmp_path)
    assert f"(run.hang_timeout_s): rank {stage} (host " in reason
    assert "makes no progress" in reason
    assert reason.count("(host ") == 1


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """Six steps with a save every two; at most one consecutive step may be skipped."""
    overrides = (
        *UNTIED,
        "evaluate.interval=0",
        "checkpoint.save_interval=2",
        "train.max_consecutive_skips=1",
        "train.compile=false",
    )
    return parse_config(settings(corpus, tmp_path, *overrides))


def on_stages(config: Config, mesh: Mesh) -> Config:
    return changed(config, parallel={"pipeline_model_parallel_size": mesh.pp.size})


@distributed(Layout(pp=2), Layout(pp=3))
@pytest.mark.parametrize("stage", [0, -1])
def test_all_stages_skip_what_is_bad_on_one(mesh: Mesh, config: Config, stage: int) -> None:
    """NaN on one stage at step 3 gives the curve of a run that skips this step on purpose."""
    config = on_stages(config, mesh)
    with poisoned(mesh, range(17, 18) if mesh.pp.rank == stage % mesh.pp.size else ()):
        curve = run(mesh, config, name="bad")
    with forced_skip(3):
        expected = run(mesh, config, name="forced")
    assert curve[2].pop("train/grad_norm") is None
    expected[2].pop("train/grad_norm")
    assert curve == expected
    assert [row.get("train/skipped_steps", 0) for row in curve] == [0, 0, 1, 1, 1, 1]


def roll_back_once(mesh: Mesh, config: Config, name: str) -> None:
    config = on_stages(config, mesh)
    with poisoned(mesh, range(16, 40) if mesh.is_last_stage else ()) as seen:
        run(mesh, config, name=name)
    assert [step for step, _ in seen] == [0, 1, 2, 3, 2, 3, 4, 5]


def test_stages_roll_back_together(config: Config) -> None:
    """Steps 3 and 4 are bad on the last stage: back to step 2, with the bits of one process."""
    for layout, name in ((ONE_RANK, "one"), (Layout(pp=2), "stages")):
        run_on(layout, roll_back_once, config=config, name=name)
    one, stages_ = (rows(Path(config.run.directory), name) for name in ("one", "stages"))
    assert stages_ == one
    assert [row["train/grad_norm"] is None for row in one] == [False, False, True, *[False] * 3]


def test_a_failed_save_of_the_last_stage_is_reported(config: Config) -> None:
    """It costs one checkpoint, and the next save works."""
    run_on(Layout(pp=2), a_failed_save_is_reported, config=config)


@distributed(Layout(pp=2), Layout(dp=2, pp=2))
def test_different_copies_of_a_tied_table_end_the_run(mesh: Mesh, config: Config) -> None:
    """On all ranks; exit.json has code 6, the table and the stages."""
    config = on_stages(config, mesh)
    config = changed(config, model={"untie_embeddings_and_output_weights": False})
    name = "parameters.embedding.weight"
    with pytest.raises(ReplicaMismatchError) as caught, RunFolder(config, mesh) as folder:  # noqa: PT012
        started, state = start_run(config, mesh, folder)
        check_replicas(started, state)
        if mesh.world.rank == mesh.world.size - 1:
            flip_a_bit(weight_tensors(started.model)[name].tensor)
        check_replicas(started, state)
    first, last = mesh.dp.size - 1, mesh.world.size - 1
    expected = f"{name} on rank {first}, {last} (of pp ranks [{first}, {last}])"
    assert expected in str(caught.value)
    if mesh.world.rank == 0:
        report = json.loads((folder.path / "exit.json").read_text())
        assert (report["code"], report["reason"]) == (6, str(caught.value))
