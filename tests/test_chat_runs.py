"""Whole runs on conversations: training on every layout, evaluate.py, generate.py, export.py."""

import json
from pathlib import Path
from typing import Any

import pytest

import export as export_module
from checkpoints import held_checkpoint
from configs import Config, UserError, parse_config
from configs.program_settings import run_config
from data import load_tokenizer
from data.corpus.encoding import encode_chat
from export import Settings as ExportSettings
from export import export
from model import Sampling, generate
from parallel import Mesh
from tests.data_chats import CHATS, messages_of, write_byte_tokenizer, write_chats
from tests.data_corpora import write_json_tokenizer
from tests.distributed import ONE_RANK, Layout, distributed, run_on
from tests.runs import rows, settings, train_on
from tests.test_context_runs import assert_near
from tests.trained_runs import assert_scored_like_training, start_program
from train import train
from training.inference import load_for_inference
from training.run_folder import RunFolder
from training.signals import StopSignals


def arguments(folder: Path, directory: Path, *more: str) -> list[str]:
    """Return the settings of a run on the conversations of the table."""
    return settings(
        write_chats(folder / "chats.jsonl"),
        directory,
        "data.source=jsonl",
        "data.format=messages",
        f"data.tokenizer={write_byte_tokenizer(folder / 'bytes')}",
        "data.vocab_size=null",
        "data.validation_fraction=0.2",
        "model.seq_length=64",
        *more,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on one rank."""
    folder = tmp_path_factory.mktemp("chats")
    train_on(ONE_RANK, arguments(folder, folder))
    return folder / "test"


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, dp=2),
        Layout(cp=2),
        Layout(cp=2, cp_comm_type="p2p"),
        Layout(pp=2),
    ],
    ids=str,
)
def test_every_layout_gives_the_same_losses(run: Path, tmp_path: Path, layout: Layout) -> None:
    """With packed rows and document masks, as data.format sets them; evaluations too."""
    train_on(layout, arguments(run.parent, tmp_path))
    assert_near(rows(tmp_path), rows(run.parent))
    assert (tmp_path / "test/samples.jsonl").read_text() == (run / "samples.jsonl").read_text()


def test_padded_rows_give_the_losses_of_any_layout(run: Path, tmp_path: Path) -> None:
    """One conversation a row, on one rank and on two."""
    for layout in (ONE_RANK, Layout(dp=2)):
        more = ("data.sequence_mode=pad", "train.train_steps=3")
        train_on(layout, arguments(run.parent, tmp_path / str(layout), *more))
    first, second = (rows(tmp_path / str(layout)) for layout in (ONE_RANK, Layout(dp=2)))
    assert_near(second, first)


def refuse(mesh: Mesh, arguments: list[str]) -> None:
    """Resume in another format."""
    config = parse_config(arguments)
    message = r"data\.format=prompt_completion \(was messages\)"
    with pytest.raises(UserError, match=message), RunFolder(config, mesh) as folder:
        train(config, mesh, folder, StopSignals())


def test_a_resume_continues_the_curve(run: Path, tmp_path: Path) -> None:
    """Another format would be another run."""
    train_on(ONE_RANK, arguments(run.parent, tmp_path, "run.stop_at_step=3"))
    train_on(ONE_RANK, arguments(run.parent, tmp_path))
    assert rows(tmp_path) == rows(run.parent)
    other = ("data.format=prompt_completion", "data.prompt_field=messages")
    other = (*other, "data.completion_field=messages", "train.train_steps=9")
    run_on(ONE_RANK, refuse, arguments=arguments(run.parent, tmp_path, *other))


@distributed(ONE_RANK, Layout(tp=2))
def test_evaluate_scores_the_targets_of_training(mesh: Mesh, run: Path) -> None:
    """The last evaluation of the run."""
    assert_scored_like_training(mesh, run)


def test_evaluate_reads_conversations(run: Path, tmp_path: Path) -> None:
    """In the format of the run or another; targets and bytes are counted, eos has none."""
    output, path = tmp_path / "result.json", tmp_path / "some.jsonl"
    path.write_text(json.dumps({"messages": messages_of(["u:Hi", "a:Yo", "u:Ok", "a:Bye"])}))

    def evaluated(*more: str) -> Any:
        given = [f"run={run}", "source=jsonl", f"path={path}", f"output={output}"]
        assert start_program(1, "evaluate.py", *given, *more)[0] == 0
        return json.loads(output.read_text())

    result = evaluated()
    assert (result["tokens"], result["bytes"]) == (3 + 4, 2 + 3)
    path.write_text(json.dumps({"q": "one ", "a": "two"}))
    result = evaluated("format=prompt_completion", "prompt_field=q", "completion_field=a")
    assert (result["tokens"], result["bytes"]) == (4, 3)


def answer_on(mesh: Mesh, run: Path, output: Path) -> None:
    """Write the greedy answers to two messages of one conversation."""
    trained = load_for_inference(run_config(str(run), precision="fp32"), run, mesh, None)
    tokenizer, messages = trained.tokenizer, []
    for prompt in ("Hi", "Ok?"):
        messages.append({"role": "user", "content": prompt})
        tokens = encode_chat(messages, tokenizer)
        ids = {"num_ids": tokenizer.vocab_size, "end_id": tokenizer.eos_id}
        found = generate(trained.model, tokens, 6, Sampling(temperature=0.0), **ids)
        new = [token for token in found[len(tokens) :] if token != tokenizer.eos_id]
        messages.append({"role": "assistant", "content": tokenizer.decode(new)})
    output.write_text(json.dumps([message["content"] for message in messages[1::2]]))


def test_generate_prints_the_answers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a prompt, and to the lines of stdin as the turns of one conversation."""
    run_on(ONE_RANK, answer_on, run=run, output=tmp_path / "answers.json")
    answers = json.loads((tmp_path / "answers.json").read_text())
    given = (f"run={run}", "chat=true", "max_new_tokens=6", "temperature=0")
    code, written = start_program(1, "generate.py", *given, "prompt=Hi")
    assert (code, written.decode()) == (0, answers[0])
    code, written = start_program(1, "generate.py", *given, given="Hi\nOk?\n")
    assert (code, written.decode()) == (0, "".join(f"{answer}\n" for answer in answers))
    history = len("^[user]|Hi|[assistant]|") + len(answers[0].encode())
    second = history + len("$[user]|Ok?|[assistant]|")
    assert f"after a prompt of {second} in" in capsys.readouterr().err
    for more, message in (
        ("bos=false", "bos=false has no effect with chat=true"),
        ("num_samples=2", "num_samples=2 answers cannot continue one conversation"),
    ):
        assert start_program(1, "generate.py", *given, more) == (2, b"")
        assert message in capsys.readouterr().err


def export_on(mesh: Mesh, settings: ExportSettings, config: Config) -> None:
    """Export on every rank."""
    export(settings, config, mesh)


@distributed(ONE_RANK)
def test_export_leaves_out_a_template_with_other_tokens(
    mesh: Mesh, run: Path, tmp_path: Path
) -> None:
    """And says why: a chat with the exported model would not be that of training."""
    tokenizer = load_tokenizer(write_json_tokenizer(tmp_path, "metaspace"))
    given, warnings = ExportSettings(run=str(run), output=str(tmp_path / "out")), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module.logger, "warning", warnings.append)
        with held_checkpoint(run / "checkpoints", mesh) as checkpoint:
            assert checkpoint is not None
            files = export_module.small_files(given, run_config(str(run)), checkpoint, tokenizer)
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    assert "exported without chat_template: transformers encodes a conversation" in warnings[0]


@pytest.mark.slow
def test_export_has_the_chat_template(run: Path, tmp_path: Path) -> None:
    """With the check against transformers, which gives the tokens of generate.py."""
    import transformers  # noqa: PLC0415  takes seconds

    out = tmp_path / "out"
    given = ExportSettings(run=str(run), output=str(out))
    run_on(ONE_RANK, export_on, settings=given, config=run_config(str(run), precision="fp32"))
    theirs = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    messages = messages_of(CHATS[21][0])
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert bytes(i - 2 for i in ids if i > 1).decode() == (
        "[user]\nHi\n[assistant]\nYo[user]\nOk\n[assistant]\nBye[assistant]\n"
    )
    assert [place for place, i in enumerate(ids) if i < 2] == [0, 25, 51]
