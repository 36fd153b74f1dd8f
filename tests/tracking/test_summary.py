"""What a person is told: a run of two ranks that stops on its way, goes on, and is trained on."""

import gzip
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs import parse_config
from model import num_parameters
from tests.runs import finish, settings, start
from tracking.summary import Progress, read_progress
from training.state import RunState

LAYOUT = "parallel.tensor_model_parallel_size=2"


@dataclass(frozen=True)
class Told:
    """What three launches said, and the run folder that they left."""

    arguments: list[str]
    stopped: str
    finished: str
    trained_on: str
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def told(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Stopped after step 3 of 6 while it profiles 2 to 5, then with the lines that it prints.

    On from there to the end, and to twice as many steps, that by one rank.
    """
    directory = tmp_path_factory.mktemp("told")
    profile = "logging.profile_steps=[2, 5]"
    arguments = settings(corpus, directory, profile, "checkpoint.save_interval=2")
    stopped = finish(start(2, [*arguments, "run.stop_at_step=3", "run.resume=never"]))
    resume = json.loads((directory / "test" / "exit.json").read_text())["resume"]
    assert f"resume with\n  {resume}\n" in stopped
    finished = finish(start(2, arguments_of(resume)))
    (more,) = re.findall(r"train on with\n  (.*)", finished)
    trained_on = finish(start(1, [*arguments_of(more), LAYOUT.replace("2", "1")]))
    return Told(arguments, stopped, finished, trained_on, directory / "test")


def arguments_of(line: str) -> list[str]:
    """Of a command that a run has printed."""
    launcher, _, arguments = line.partition("train.py ")
    assert launcher.startswith("torchrun --nproc-per-node 2 ")
    return shlex.split(arguments)


def facts(output: str, name: str) -> list[str]:
    """What stands behind a name, each time."""
    return re.findall(rf"^  {name} +(\S.*)$", output, re.MULTILINE)


def fact(output: str, name: str) -> str:
    (text,) = facts(output, name)
    return text


def test_the_beginning(told: Told) -> None:
    """Each figure against its own source: the configuration, the corpus."""
    config = parse_config([*told.arguments, LAYOUT], lambda _: 2)
    assert "run test begins\n" in told.stopped
    parameters = f"{num_parameters(config.model, 331):,} parameters"
    shape = "2 layers, hidden size 32, 4 heads, vocabulary 331"
    assert fact(told.stopped, "model") == f"{parameters}: {shape}"
    assert fact(told.stopped, "ranks") == (
        "2: tensor parallel 2 with sequence parallelism x data parallel 1, each 1 thread of cpu; "
        "float32"
    )
    found = re.fullmatch(
        r"6 steps of 8 rows, 1,776 tokens, ([\d.]+) epochs of (\d+) rows; "
        r"in this launch steps 1 to 3",
        fact(told.stopped, "plan"),
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(6 * 8 / int(found[2]), abs=0.005)


def test_training_on_says_where_the_learning_rate_goes(told: Told) -> None:
    """From the end of the cosine to where twice as many steps have it."""
    rates = {row["step"]: row["train/learning_rate"] for row in told.rows if "train/loss" in row}
    assert rates[7] > 2 * rates[6]
    assert (
        "the schedule has changed (train.train_steps=12, was 6): the learning rate goes from "
        f"{rates[6]:.2e} in step 6 to {rates[7]:.2e} in step 7\n"
    ) in told.trained_on
    assert "the schedule has changed" not in told.finished


def test_where_everything_goes(told: Told) -> None:
    """Paths that are there at the end, and the command that shows them."""
    folder = told.folder
    when = "with checkpoints every 2 steps and at the end, of which the newest 2 are kept"
    assert fact(told.stopped, "folder") == f"{folder}, {when}"
    assert fact(told.stopped, "profile") == f"steps 2 to 5, {folder}/profile"
    assert fact(told.trained_on, "profile") == "steps 2 to 5: not in this launch"
    assert facts(told.stopped, "wandb") == []  # disabled
    dashboard = f"make dashboard ARGS=runs={folder.parent}"
    assert facts(told.stopped, "to look at") == [dashboard] * 2


def test_a_launch_that_stops_says_how_to_go_on(told: Told) -> None:
    """With what it has reached, all of it from metrics.jsonl."""
    assert "run test reached run.stop_at_step=3: step 3 of 6 (3 in this launch)\n" in told.stopped
    evaluation = next(row for row in told.rows if row["step"] == 3 and "eval/loss" in row)
    bits, loss = evaluation["eval/bits_per_byte"], evaluation["eval/loss"]
    expected = f"{bits:.4f} bits per byte, loss {loss:.4f}, at step 3"
    assert fact(told.stopped, "best") == expected
    assert re.fullmatch(
        r"3 steps, 888 tokens in 0:\d\d, of which 0:\d\d in steps: [\d,]+ tokens/s; "
        r"peak \d\.\d\d GiB on rank 0",
        fact(told.stopped, "this launch"),
    )
    assert facts(told.stopped, "skipped") == []
    assert fact(told.stopped, "checkpoint") == f"{told.folder}/checkpoints/step_00000003"


def test_a_finished_run_says_how_to_train_on(told: Told) -> None:
    """The best evaluation is that of the whole run; the command doubles the steps, and works."""
    assert "run test goes on after step 3\n" in told.finished
    assert fact(told.finished, "plan").endswith("; in this launch steps 4 to 6")
    assert "run test is finished: step 6 of 6 (3 in this launch)\n" in told.finished
    best = min(
        (row for row in told.rows if "eval/loss" in row and row["step"] <= 6),
        key=lambda row: float(row["eval/bits_per_byte"]),
    )
    assert fact(told.finished, "best").startswith(f"{best['eval/bits_per_byte']:.4f} bits")
    assert fact(told.finished, "best").endswith(f"at step {best['step']}")
    assert "run test goes on after step 6\n" in told.trained_on
    assert "run test is finished: step 12 of 12 (6 in this launch)\n" in told.trained_on


def test_a_step_is_one_plain_line(told: Told) -> None:
    """Without colours: this is no terminal."""
    lines = [line for line in told.stopped.splitlines() if line.startswith("step ")]
    pattern = (
        r"step [123]/3 \| loss \d\.\d{4} \| grad norm \d+\.\d{3} \| lr \d\.\d\de-\d\d"
        r" \| [\d,]+ tokens/s \| mfu \d+\.\d% \| \d\.\d\d GiB \| \d+:\d\d left"
    )
    assert len(lines) == 3
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert "\x1b" not in told.stopped + told.finished + told.trained_on


def test_every_rank_leaves_a_trace(told: Told) -> None:
    """Of the steps that were asked for and done, in each launch; rank 0 says where time went."""
    expected = {
        f"steps_{steps}.rank_{rank}.json.gz": launch
        for steps, launch in (("2_to_3", told.stopped), ("4_to_5", told.finished))
        for rank in (0, 1)
    }
    assert {path.name for path in (told.folder / "profile").iterdir()} == set(expected)
    seen_by_rank_zero: dict[str, set[str]] = {}
    for name, launch in expected.items():
        with gzip.open(told.folder / "profile" / name, "rt") as file:
            seen = {str(event.get("name")) for event in json.load(file)["traceEvents"]}
        steps = {f"step {number}" for number in re.findall(r"\d+", name)[:2]}
        assert {name for name in seen if name.startswith("step ")} == steps
        assert {"aten::mm", "aten::_fused_adamw_", "waiting for data"} <= seen
        if ".rank_0." in name:
            seen_by_rank_zero[launch] = seen
    for launch, seen in seen_by_rank_zero.items():
        table = launch.partition("profile of steps ")[2].partition("trace is in")[0]
        rows = re.findall(r"^ +([\d.]+) ms a step +([\d.]+)%  (.+)$", table, re.MULTILINE)
        times = [float(milliseconds) for milliseconds, _, _ in rows]
        assert len(rows) == 12
        assert {operator for _, _, operator in rows} <= seen
        assert times == sorted(times, reverse=True)
        assert 50 < sum(float(share) for _, share, _ in rows) <= 100.5


def test_progress_of_a_file_that_is_not_as_usual(tmp_path: Path) -> None:
    """Null where a number was not finite, no targets in a step, a torn last line; or no file."""
    began = RunState(wandb_id="", step=1, tokens=100)
    assert read_progress(tmp_path / "metrics.jsonl", began) == Progress()
    rate = "speed/tokens_per_second"
    rows: list[dict[str, Any]] = [
        {"step": 1, "tokens": 100, "train/loss": 5.0, rate: 1.0},
        {"step": 1, "eval/loss": 1.0, "eval/bits_per_byte": 2.0},
        {"step": 2, "tokens": 300, "train/loss": 4.0, rate: 100.0},
        {"step": 2, "eval/loss": 0.5, "eval/bits_per_byte": 1.5},
        {"step": 3, "tokens": 300, "train/loss": 4.0, rate: 0.0},
        {"step": 4, "tokens": 400, "train/loss": None, rate: 50.0},
        {"step": 4, "eval/loss": None, "eval/bits_per_byte": None},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "tr')
    assert read_progress(tmp_path / "metrics.jsonl", began) == Progress(rows[3], rows[5], 4.0)
