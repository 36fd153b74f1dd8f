"""evaluate.py gives the score of training on held-out text, the reference's on other text."""

import json
import math
import os
from pathlib import Path

import pytest

from configs import Config, DataConfig, UserError
from configs.load import to_yaml
from configs.program_settings import run_config
from configs.schema import WeightedSource
from data.tasks import METRICS, TaskResult
from evaluate import Settings, parse, report_tasks, text_to_score
from parallel import Mesh
from tests.data_corpora import lossy_model, random_text
from tests.distributed import ONE_RANK, Layout, distributed
from tests.runs import finish, rows, settings, start
from tests.trained_runs import FAMILIES, Dense, start_program
from tests.training.test_evaluation import reference_score
from training.evaluation import eval_batches, score
from training.inference import load_for_inference

# A text that occurs twice is scored twice.
TEXTS = ["while True:\n    é = '漢'\n" * 9, "def f", "def f"]


@distributed(ONE_RANK, Layout(tp=2), Layout(tp=2, dp=2), Layout(dp=4))
@pytest.mark.parametrize("family", FAMILIES)
def test_held_out_text_has_the_score_of_training(
    mesh: Mesh, runs: dict[str, Path], family: str
) -> None:
    """Exactly on the layout that trained, within 2e-6 on others."""
    run = runs[family]
    config = run_config(str(run))
    trained = load_for_inference(config, run, mesh, None)
    corpus, most = text_to_score(trained, Settings(str(run)))
    found = score(trained.model, eval_batches(corpus, config, mesh, max_sequences=most))
    expected = rows(run.parent)[-1]
    is_same = (mesh.tp.size, mesh.dp.size) == (2, 2)
    tolerance = 0 if is_same else 2e-6
    assert found.loss == pytest.approx(expected["eval/loss"], rel=tolerance)
    assert found.perplexity == pytest.approx(expected["eval/perplexity"], rel=10 * tolerance)
    assert found.bits_per_byte == pytest.approx(expected["eval/bits_per_byte"], rel=tolerance)


@pytest.mark.parametrize(("family", "ranks", "stride"), [("gpt", 1, None), ("llama", 2, 5)])
def test_any_text_has_the_score_of_the_reference(
    runs: dict[str, Path], tmp_path: Path, family: str, ranks: int, stride: int | None
) -> None:
    """Every document of a jsonl file counts with its bytes; the output file has all numbers."""
    run, output, path = runs[family], tmp_path / "result.json", tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"content": text}) for text in TEXTS))
    arguments = [f"run={run}", "source=jsonl", f"path={path}"]
    arguments += ["text_field=content", f"output={output}"]
    arguments += [f"stride={stride}"] if stride else []
    code, written = start_program(ranks, "evaluate.py", *arguments)
    result, dense = json.loads(output.read_text()), Dense(run)
    nats, num_targets = reference_score(dense.weights, dense.config, dense.file(TEXTS), stride)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert code == 0
    assert list(result) == ["loss", "perplexity", "bits_per_byte", "tokens", "bytes"]
    assert (result["tokens"], result["bytes"]) == (num_targets, num_bytes)
    assert result["loss"] == pytest.approx(nats / num_targets, rel=2e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / num_targets), rel=2e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=2e-6)
    assert f"{result['bits_per_byte']:.4f} bits/byte" in written.decode()


def test_unknown_tokens_are_reported_in_training_and_after(tmp_path: Path) -> None:
    """At the start, at each evaluation and in evaluate.py, for one file whose end is held out."""
    lines = [f"{line} {chr(0x4E00 + number)}" for number, line in enumerate(random_lines())]
    (tmp_path / "input.txt").write_text("\n".join(lines))
    model = lossy_model(tmp_path, random_lines())
    arguments = settings(tmp_path / "input.txt", tmp_path, f"data.tokenizer={model}")
    for first in (True, False):
        steps = 3 if first else 6
        output = finish(start(1, [*arguments, f"train.train_steps={steps}"]))
        assert output.count("train tokens (") == output.count("validation tokens (") == 1
        assert output.count("scored tokens (") == 1
        assert output.count("held-out documents that were compared decode to another text") == 1
    last = rows(tmp_path)[-1]
    assert 0 < last["eval/unknown_fraction"] < 0.2
    output_path = tmp_path / "result.json"
    code, _ = start_program(1, "evaluate.py", f"run={tmp_path / 'test'}", f"output={output_path}")
    result = json.loads(output_path.read_text())
    assert code == 0
    assert result["unknown_tokens"] / result["tokens"] == last["eval/unknown_fraction"]
    assert result["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=2e-6)


def random_lines() -> list[str]:
    """Lines of words in the vocabulary of a small tokenizer."""
    return random_text(1, 400).split("\n")


def test_invalid_settings_are_one_line(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is reported before torch is imported."""
    run = f"run={runs['gpt']}"
    for arguments, message in (
        (["path=x"], "path=x is not used with source=held_out; choose its format"),
        (["source=text"], "path is missing: source=text needs a file, a folder or a glob"),
        (["source=text", "path=/nowhere"], "error: path=/nowhere does not exist"),
        (["stride=38"], "stride=38 is more than model.seq_length=37, the length of a window"),
        (["output=/nowhere/x.json"], "output=/nowhere/x.json: its parent directory does not exist"),
        (["windows=3"], "there is no key windows; "),
        (["task=/nowhere.jsonl"], "task=/nowhere.jsonl cannot be read: No such file"),
        (["task=x", "source=text", "path=x"], "source=text is not used with task; omit one"),
        (["task=x", "stride=3"], "stride=3 is not used with task; omit it"),
        (["task=x", "max_sequences=1"], "max_sequences=1 is not used with task; omit it"),
        (["task=x", "format=messages"], "format=messages is not used with task; omit it"),
        (["format=text"], "format=text is not used with source=held_out; omit it"),
        (["text_field=a"], "text_field=a is not used with source=held_out; omit it"),
        (["hub_split=test"], "hub_split=test is not used with source=held_out; omit it"),
        (["items=x.jsonl"], "items=x.jsonl is not used without task=FILE"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse([run, *arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_by_its_key() -> None:
    """Of two files, the one that is on a full disk."""
    settings = Settings("unused", task=("x",), items="/dev/full", output=os.devnull)
    with pytest.raises(UserError, match="cannot write items=/dev/full: No space left on device"):
        report_tasks([TaskResult("x", [dict.fromkeys(METRICS, 1.0)])], settings)


def test_the_format_of_a_mixture_is_that_of_all_its_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With sources that differ, what is needed must be given."""
    (tmp_path / "x.jsonl").touch()

    def parsed(*words: str, sources: list[WeightedSource]) -> DataConfig:
        config = Config(data=DataConfig(sources=tuple(sources)))
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        given = [f"run={tmp_path}", "source=jsonl", f"path={tmp_path / 'x.jsonl'}"]
        return parse([*given, *words])[1].data

    text, chat, other_chat = (
        WeightedSource("jsonl", "x", format=kind, messages_field=column)
        for kind, column in (("text", "messages"), ("messages", "a"), ("messages", "b"))
    )
    found = parsed(sources=[chat, chat])
    assert (found.format, found.messages_field) == ("messages", "a")
    found = parsed("format=messages", sources=[chat, text])
    assert (found.format, found.messages_field) == ("messages", "a")
    found = parsed("messages_field=c", sources=[chat, other_chat])
    assert (found.format, found.messages_field) == ("messages", "c")
    assert parsed("format=text", sources=[chat, chat]).format == "text"
    for sources, message in (
        ([chat, text], "format=null: the sources of the run differ in it (messages, text); give"),
        ([chat, other_chat], "messages_field=null: the sources of the run differ in it (a, b); g"),
    ):
        with pytest.raises(SystemExit) as ended:
            parsed(sources=sources)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
