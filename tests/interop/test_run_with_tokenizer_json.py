"""A run with a tokenizer.json: trained, resumed, used, exported and imported again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs import parse_config, read_config
from configs.program_settings import run_config
from data import load_tokenizer
from export import Settings as ExportSettings
from export import export
from import_hf import Settings as ImportSettings
from import_hf import import_model
from interop.check import Comparison, unusual_texts
from parallel import Mesh
from tests.data_corpora import write_json_tokenizer
from tests.distributed import ONE_RANK, Layout, distributed, run_on
from tests.runs import rows, settings, train_on
from tests.trained_runs import assert_scored_like_training, start_program
from train import train
from training.run_folder import RunFolder
from training.signals import StopSignals


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at DP=2 with a tokenizer like Llama 3's, in a folder with tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("json")
    write_json_tokenizer(folder / "tokenizer", "llama3")
    train_on(Layout(dp=2), arguments(corpus, folder))
    return folder / "test"


def arguments(corpus: Path, folder: Path, *more: str) -> list[str]:
    given = [f"data.tokenizer={folder / 'tokenizer'}", "data.vocab_size=null"]
    return settings(corpus, folder, *given, "run.name=test", *more)


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run.parent, folder, dirs_exist_ok=True)
    return folder / run.name


def test_the_run_folder_has_all_that_other_programs_need(run: Path) -> None:
    """The file itself, and size, bos and eos in config.yaml."""
    original = run.parent / "tokenizer/tokenizer.json"
    assert (run / "tokenizer.json").read_bytes() == original.read_bytes()
    assert not (run / "tokenizer.model").exists()
    data = read_config(run / "config.yaml").data
    assert (data.vocab_size, data.bos_token, data.eos_token) == (400, "<s>", "</s>")


def refuse(mesh: Mesh, arguments: list[str]) -> None:
    config = parse_config(arguments)
    message = "the tokenizer is another with data.eos_token=<s>"
    with pytest.raises(ValueError, match=message), RunFolder(config, mesh) as folder:
        train(config, mesh, folder, StopSignals())


def test_resume(run: Path, corpus: Path, tmp_path: Path) -> None:
    """With the original or the run's own copy, but not with another eos."""
    moved = copied(run, tmp_path)
    train_on(ONE_RANK, arguments(corpus, tmp_path, "train.train_steps=7"))
    shutil.rmtree(tmp_path / "tokenizer")
    own = [f"config={moved}/config.yaml", f"data.tokenizer={moved}/tokenizer.json"]
    own += ["run.name=test", f"run.directory={tmp_path}"]
    train_on(ONE_RANK, [*own, "train.train_steps=8"])
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 4), 3, *range(4, 7), 6, 7, 7, 8, 8]
    other = [*own, "train.train_steps=9", "data.eos_token=<s>"]
    run_on(ONE_RANK, refuse, arguments=other)


@distributed(ONE_RANK, Layout(tp=2))
def test_held_out_text_has_the_score_of_training(mesh: Mesh, run: Path) -> None:
    """evaluate.py reads the tokenizer of the run."""
    assert_scored_like_training(mesh, run)


def test_programs(run: Path, tmp_path: Path) -> None:
    """generate.py continues a prompt; evaluate.py counts the bytes of a text."""
    code, written = start_program(
        1, "generate.py", f"run={run}", "prompt=def é", "max_new_tokens=5"
    )
    assert code == 0
    assert written.decode().startswith("def é")
    (tmp_path / "a.txt").write_text("return </s> é漢\n" * 20)
    output = tmp_path / "result.json"
    given = [f"run={run}", "source=text", f"path={tmp_path}/a.txt", f"output={output}"]
    assert start_program(1, "evaluate.py", *given)[0] == 0
    result = json.loads(output.read_text())
    assert result["bytes"] == len((tmp_path / "a.txt").read_bytes())
    assert "unknown_tokens" not in result


def export_on(mesh: Mesh, settings: ExportSettings, config: Any) -> None:
    comparison = export(settings, config, mesh)
    assert isinstance(comparison, Comparison)


def import_on(mesh: Mesh, settings: ImportSettings) -> None:
    import_model(settings, mesh)


def test_export_and_import(run: Path, tmp_path: Path) -> None:
    """The same file goes out and comes back; transformers gives the same ids."""
    import transformers  # noqa: PLC0415  takes seconds

    out, again = tmp_path / "out", tmp_path / "again"
    given = ExportSettings(run=str(run), output=str(out))
    run_on(ONE_RANK, export_on, settings=given, config=run_config(str(run)))
    content = (run / "tokenizer.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == content
    assert not (out / "tokenizer.model").exists()
    ours = load_tokenizer(run.parent / "tokenizer")
    auto = transformers.AutoTokenizer.from_pretrained(out)
    assert (auto.bos_token_id, auto.eos_token_id) == (ours.bos_id, ours.eos_id) == (0, 1)
    for text in unusual_texts(ours, 200):
        assert auto(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    for file in (out / "generation_config.json", out / "config.json"):
        options = json.loads(file.read_text())
        assert (options["bos_token_id"], options["eos_token_id"]) == (0, 1)
    run_on(ONE_RANK, import_on, settings=ImportSettings(source=str(out), run=str(again)))
    assert (again / "tokenizer.json").read_bytes() == content
    data = read_config(again / "config.yaml").data
    assert (data.vocab_size, data.bos_token, data.eos_token) == (400, "<s>", "</s>")
    manifest = json.loads((again / "checkpoints/step_00000000/manifest.json").read_text())
    assert ours.fingerprint in json.dumps(manifest)
