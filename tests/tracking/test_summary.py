"""The console of a run that stops early, resumes, and is trained longer."""

import gzip
import json
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import parse_config
from model import num_parameters
from tests.runs import finish, settings, start
from tracking.summary import report_end
from training.state import Run, RunState

LAYOUT = "parallel.tensor_model_parallel_size=2"


@dataclass(frozen=True)
class Outputs:
    """The console output of three launches, and their run folder."""

    arguments: list[str]
    stopped: str
    finished: str
    longer: str
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def outputs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Stop after step 3 of 6 while profiling 2 to 5; finish; train to step 12 on one rank.

    The second and the third launch use the command that the previous one printed.
    """
    directory = tmp_path_factory.mktemp("runs")
    profile = "logging.profile_steps=[2, 5]"
    arguments = settings(corpus, directory, profile, "checkpoint.save_interval=2")
    stopped = finish(start(2, [*arguments, "run.stop_at_step=3", "run.resume=never"]))
    resume = json.loads((directory / "test" / "exit.json").read_text())["resume"]
    assert f"resume with\n  {resume}\n" in stopped
    finished = finish(start(2, arguments_of(resume)))
    (command,) = re.findall(r"to train longer:\n  (.*)", finished)
    longer = finish(start(1, [*arguments_of(command), LAYOUT.replace("2", "1")]))
    return Outputs(arguments, stopped, finished, longer, directory / "test")


def arguments_of(command: str) -> list[str]:
    """Return the arguments of a command that a run has printed."""
    launcher, _, arguments = command.partition("train.py ")
    assert launcher.startswith("torchrun --nproc-per-node 2 ")
    return shlex.split(arguments)


def facts(output: str, name: str) -> list[str]:
    """Return what each summary says about a name."""
    return re.findall(rf"^  {name}: +(\S.*)$", output, re.MULTILINE)


@pytest.mark.slow
def test_the_start(outputs: Outputs) -> None:
    config = parse_config([*outputs.arguments, LAYOUT], lambda _: 2)
    assert "starting test at step 1\n" in outputs.stopped
    parameters = f"{num_parameters(config.model, 331):,} parameters"
    assert facts(outputs.stopped, "model") == [parameters]
    (ranks,) = facts(outputs.stopped, "ranks")
    assert re.fullmatch(r"2 = tp 2 with sequence parallelism; .+; fp32", ranks)
    assert facts(outputs.stopped, "steps") == ["1 to 3 of 6, each with 296 tokens"]
    assert facts(outputs.finished, "steps") == ["4 to 6 of 6, each with 296 tokens"]
    (data,) = facts(outputs.stopped, "data")
    found = re.fullmatch(r".*corpus\d+: (\d+) rows, ([\d.]+) epochs", data)
    assert found is not None
    assert float(found[2]) == pytest.approx(6 * 8 / int(found[1]), rel=0.01)
    assert facts(outputs.stopped, "run folder") == [str(outputs.folder)]
    dashboard = f"make dashboard ARGS=--logdir={outputs.folder.parent}"
    assert facts(outputs.stopped, "dashboard") == [dashboard]


@pytest.mark.slow
def test_the_end(outputs: Outputs) -> None:
    """Each launch says where it resumes and ends, and what to do next."""
    stopped = "run test reached run.stop_at_step=3: step 3 of 6 (3 in this launch)\n"
    assert stopped in outputs.stopped
    checkpoint = outputs.folder / "checkpoints" / "step_00000003"
    assert f"checkpoint:\n  {checkpoint}\n" in outputs.stopped
    generate = f"to generate text:\n  python generate.py run={outputs.folder}\n"
    assert generate in outputs.stopped
    assert "resuming test at step 4\n" in outputs.finished
    assert "run test is finished: step 6 of 6 (3 in this launch)\n" in outputs.finished
    assert "resuming test at step 7\n" in outputs.longer
    assert "run test is finished: step 12 of 12 (6 in this launch)\n" in outputs.longer


@pytest.mark.slow
def test_a_longer_schedule_changes_the_learning_rate(outputs: Outputs) -> None:
    """A warning gives the rates before and after: the cosine ends later."""
    rates = {row["step"]: row["train/learning_rate"] for row in outputs.rows if "train/loss" in row}
    assert rates[7] > 2 * rates[6]
    assert f"{rates[6]:.2e} in step 6 to {rates[7]:.2e} in step 7\n" in outputs.longer
    assert f"{rates[6]:.2e} in step 6" not in outputs.finished


@pytest.mark.slow
def test_a_step_is_one_plain_line(outputs: Outputs) -> None:
    # The profilers of the ranks also write to stderr, parts of lines at a time.
    lines = re.findall(r"step \d+/\d+ \|.*", outputs.stopped)
    pattern = (
        r"step [123]/3 \| loss \d\.\d{4} \| grad norm \d+\.\d{3} \| lr \d\.\d\de-\d\d"
        r" \| [\d,]+ tokens/s \| mfu \d+\.\d% \| \d\.\d\d GiB \| \d+:\d\d left"
    )
    assert len(lines) == 3
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert "\x1b" not in outputs.stopped + outputs.finished + outputs.longer


@pytest.mark.slow
def test_rows_have_the_promised_keys(outputs: Outputs) -> None:
    """TensorBoard shows the same metrics, of all launches."""
    training = [row for row in outputs.rows if "train/loss" in row]
    evaluations = [row for row in outputs.rows if "eval/loss" in row]
    metrics = {"train/loss", "train/grad_norm", "train/learning_rate", "speed/tokens_per_second"}
    metrics |= {"speed/mfu", "memory/peak_gib"}
    assert all(set(row) == metrics | {"step", "tokens", "time_s"} for row in training)
    scores = {"eval/loss", "eval/perplexity", "eval/bits_per_byte"}
    assert all(set(row) == scores | {"step", "time_s"} for row in evaluations)
    assert [row["step"] for row in training] == list(range(1, 13))
    assert [row["step"] for row in evaluations] == [3, 6, 9, 12]
    events = EventAccumulator(str(outputs.folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == metrics | scores
    for name, expected in (("train/loss", training), ("eval/loss", evaluations)):
        drawn = [(event.step, event.wall_time, event.value) for event in events.Scalars(name)]
        assert drawn == [
            (row["step"], row["time_s"], pytest.approx(row[name], rel=1e-6)) for row in expected
        ]


@pytest.mark.slow
def test_every_rank_leaves_a_trace(outputs: Outputs) -> None:
    """Traces have the requested steps of each launch; rank 0 logs a table."""
    expected = {
        f"steps_{steps}.rank_{rank}.json.gz": launch
        for steps, launch in (("2_to_3", outputs.stopped), ("4_to_5", outputs.finished))
        for rank in (0, 1)
    }
    assert {path.name for path in (outputs.folder / "profile").iterdir()} == set(expected)
    for name, launch in expected.items():
        with gzip.open(outputs.folder / "profile" / name, "rt") as file:
            seen = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
        steps = {f"step {number}" for number in re.findall(r"\d+", name)[:2]}
        assert {name for name in seen if name.startswith("step ")} == steps
        assert {"aten::mm", "aten::_fused_adamw_", "waiting for data"} <= seen
        table = launch.partition("profile of steps ")[2].partition("Self CPU time total")[0]
        # The table cuts long names.
        operators = re.findall(r"^ *(\S.*?)(?:\.\.\.)?  +[\d.]+% ", table, re.MULTILINE)
        assert len(operators) == 12
        assert "rank_1" in name or all(any(o.startswith(n) for o in seen) for n in operators)


def test_an_end_without_a_checkpoint_names_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A signal before the first step: nothing is saved, and there is nothing to generate from."""
    config = parse_config(["config=gpt_debug.yaml"])
    folder = SimpleNamespace(
        path=tmp_path, checkpoints=tmp_path / "checkpoints", resume_command=lambda: "again"
    )
    world = SimpleNamespace(rank=0)
    run = SimpleNamespace(config=config, mesh=SimpleNamespace(world=world), folder=folder)
    state = RunState(wandb_id="")
    with caplog.at_level("INFO"):
        assert report_end(cast(Run, run), state, state, signal.SIGTERM) == 143
    assert "None" not in caplog.text
    assert "generate" not in caplog.text
    assert caplog.messages[-1].endswith("resume with\n  again")
