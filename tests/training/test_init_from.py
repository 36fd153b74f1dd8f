"""A second stage: a run that starts with the weights of another one, `run.init_from`."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from checkpoints.full_tensors import read_full_tensor
from checkpoints.manifest import read_manifest
from configs import Config, ConfigError, UserError, parse_config
from data.rows import MicroBatch
from import_hf import Settings
from parallel import Mesh
from tests.configs.test_load import PROGRAM, _python
from tests.data_corpora import prepare_corpus, small_tokenizer, write_json_tokenizer
from tests.distributed import ONE_RANK, Layout, distributed, run_on
from tests.interop.test_import_hf import hf_model, import_on
from tests.interop.test_interop_page import run as run_block
from tests.lines import ROOT
from tests.plugin import write_corpus
from tests.reference import reference_losses
from tests.runs import (
    finish,
    global_batch,
    rows,
    settings,
    start,
    steps_done,
    train_on,
    wait_for,
    workers_of,
)
from tests.trained_runs import Dense
from tests.wandb_server import logs
from train import start as start_run
from training.optimizer import training_tensors
from training.run_folder import RunFolder
from training.state import training_batches
from training.step import train_step

BASE_STEP = 30


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of thirty steps on two ranks, with checkpoints of steps 15 and 30."""
    directory = tmp_path_factory.mktemp("stages")
    overrides = (
        "run.name=base",
        "model.hidden_dropout=0",
        "evaluate.interval=0",
        "checkpoint.save_interval=15",
        f"train.train_steps={BASE_STEP}",
    )
    train_on(Layout(tp=2), settings(corpus, directory, *overrides))
    return directory / "base"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, in another order and with other words."""
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.write_text(path.read_text().replace("def", f"lambda{number}").replace("if", "elif"))
    return folder


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A copy of the run, which a test may change or delete."""
    return Path(shutil.copytree(base, tmp_path / "base"))


def second(source: Path, directory: Path, text: Path, *overrides: str) -> list[str]:
    """The arguments of a second stage: no file, no model, another text, another schedule."""
    sizes = ("tensor_model", "context", "pipeline_model")
    return [
        f"run.init_from={source}",
        "run.name=test",
        f"run.directory={directory}",
        f"data.path={text}",
        "optimizer.lr=4e-3",
        "train.train_steps=30",
        *(f"parallel.{size}_parallel_size=1" for size in sizes),
        *overrides,
    ]


def first_batch(config: Config) -> MicroBatch:
    """The rows of the first step, in one piece."""
    return global_batch(config, prepare_corpus(config.data, config.model.seq_length, 0))


def newest_state(run: Path) -> dict[str, Any]:
    """The state in the newest manifest."""
    return read_manifest(sorted((run / "checkpoints").iterdir())[-1]).state


def test_length_and_dropout_may_change(corpus: Path, text: Path, tmp_path: Path) -> None:
    """No weight of a model with rotary positions depends on them."""
    rope = ("run.name=base", "model.position_embedding_type=rope", "evaluate.interval=0")
    train_on(ONE_RANK, settings(corpus, tmp_path, *rope, "train.train_steps=2"))
    changed = ("model.seq_length=64", "model.hidden_dropout=0.2", "train.train_steps=2")
    arguments = second(tmp_path / "base", tmp_path, text, *changed)
    model = parse_config(arguments).model
    assert (model.seq_length, model.hidden_dropout) == (64, 0.2)
    train_on(ONE_RANK, arguments)
    assert steps_done(tmp_path) == 2


@pytest.mark.slow
def test_a_table_of_positions_keeps_its_length(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.seq_length=64 \(was 37\)"):
        parse_config(second(base, tmp_path, text, "model.seq_length=64"))


@pytest.mark.parametrize(
    ("layout", "steps"),
    [(ONE_RANK, 30), (Layout(tp=2), 1), (Layout(cp=2), 1), (Layout(pp=2), 1), (Layout(dp=2), 1)],
    ids=str,
)
def test_the_first_loss_is_that_of_the_weights_of_the_source(
    base: Path, text: Path, tmp_path: Path, layout: Layout, steps: int
) -> None:
    """On any layout, on the rows of the new text; schedule, steps and tokens start at zero."""
    arguments = second(base, tmp_path, text, f"train.train_steps={steps}")
    whole = first_batch(parse_config(arguments))
    dense = Dense(base, BASE_STEP)
    inputs = (whole.tokens, whole.positions, whole.targets)
    loss = reference_losses(dense.weights, dense.config.model, *inputs)[0] / whole.num_targets
    train_on(layout, arguments)
    found = [row for row in rows(tmp_path) if "train/loss" in row]
    assert found[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    assert (found[0]["tokens"], found[0]["train/learning_rate"]) == (whole.num_targets, 2e-3)
    progress, source = newest_state(tmp_path / "test")["progress"], newest_state(base)["progress"]
    assert progress["origin"] == {
        "run": "base",
        "step": BASE_STEP,
        "tokens": source["tokens"],
        "wandb_id": source["wandb_id"],
        "origin": None,
    }
    assert progress["wandb_id"] != source["wandb_id"]
    tokenizers = [(run / "tokenizer.model").read_bytes() for run in (base, tmp_path / "test")]
    assert tokenizers[0] == tokenizers[1]
    if steps > 1:
        assert found[-1]["train/loss"] < 0.9 * found[0]["train/loss"]


@distributed(ONE_RANK, Layout(dp=2), Layout(pp=2))
def test_the_first_update_continues_that_of_the_source(mesh: Mesh, text: Path, base: Path) -> None:
    """With run.init_optimizer: AdamW in float64, from the moments and the count of the source."""
    directory = base.parent / f"dp{mesh.dp.size}-pp{mesh.pp.size}"
    overrides = ("run.init_optimizer=true", "optimizer.lr_warmup_steps=0")
    config = parse_config(second(base, directory, text, *overrides))
    checkpoint = read_manifest(base / "checkpoints" / f"step_{BASE_STEP:08}")
    stored = {name: read_full_tensor(checkpoint, name) for name in checkpoint.tensors}
    with RunFolder(config, mesh) as folder:
        run, state = start_run(config, mesh, folder)
        assert (state.step, state.tokens, state.num_updates) == (0, 0, BASE_STEP)
        tensors = training_tensors(run.model, run.optimizer)
        for name, shard in tensors.items():
            assert shard.tensor.equal(stored[name][shard.slices]), name
        assert {float(s["step"]) for s in run.optimizer.state.values()} == {BASE_STEP}
        with training_batches(run, state) as batches:
            result = train_step(run, state, batches)
        state = state.advance(result, config.train.global_batch_size)
    whole = first_batch(config)
    weights = {
        name.removeprefix("parameters."): tensor.double().requires_grad_()
        for name, tensor in stored.items()
        if name.startswith("parameters.")
    }
    inputs = (whole.tokens, whole.positions, whole.targets)
    (reference_losses(weights, config.model, *inputs)[0] / whole.num_targets).backward()
    norm = torch.stack([weight.grad.norm() for weight in weights.values()]).norm()
    options, updates = config.optimizer, BASE_STEP + 1
    assert state.num_updates == updates
    for name, weight in weights.items():
        if f"exp_avg.{name}" not in tensors:  # another stage of the pipeline has it
            continue
        detail = f"{name}: {{}}".format
        ours = [tensors[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq", "parameters")]
        mean, square, after = (shard.tensor.double() for shard in ours)
        gradient = weight.grad / max(1.0, norm / options.clip_grad)
        for moment, power, beta, kind in (
            (mean, 1, options.adam_beta1, "exp_avg"),
            (square, 2, options.adam_beta2, "exp_avg_sq"),
        ):
            before = stored[f"{kind}.{name}"].double()
            expected = beta * before + (1 - beta) * gradient**power
            atol = 1e-4 * expected.abs().max().item()
            assert_close(moment, expected[ours[0].slices], rtol=0, atol=atol, msg=detail)
        decay = options.weight_decay if weight.ndim > 1 else 0.0
        root = (square / (1 - options.adam_beta2**updates)).sqrt() + options.adam_eps
        update = mean / (1 - options.adam_beta1**updates) / root
        expected = weight.detach()[ours[0].slices] * (1 - options.lr * decay) - options.lr * update
        assert_close(after, expected, rtol=1e-6, atol=1e-8, msg=detail)


@pytest.mark.slow
def test_a_killed_stage_resumes_bit_for_bit_without_its_source(
    copy: Path, text: Path, tmp_path: Path
) -> None:
    """The same command resumes; another origin is refused; run.resume=never reads it again."""
    overrides = (
        "run.init_optimizer=true",
        "train.train_steps=40",
        "checkpoint.save_interval=5",
        "logging.wandb=offline",
    )
    arguments = second(copy, tmp_path, text, *overrides)
    arguments.remove("parallel.tensor_model_parallel_size=1")
    output = finish(start(2, [*arguments, "run.name=whole"]))
    assert re.search(r"origin: +weights and optimizer state of run base at step 30$", output, re.M)
    process = start(2, arguments)
    wait_for(lambda: steps_done(tmp_path) >= 12, process)
    os.kill(workers_of(tmp_path)[1], signal.SIGKILL)
    process.communicate(timeout=300)
    shutil.rmtree(copy)
    assert "resuming from" in finish(start(2, arguments))
    assert rows(tmp_path) == rows(tmp_path, "whole")
    assert newest_state(tmp_path / "test")["progress"]["origin"]["run"] == "base"
    log = logs(tmp_path / "whole")[0].read_bytes()
    assert b"origin" in log
    assert str(tmp_path).encode() not in log

    changed = [*arguments, f"run.init_from={tmp_path / 'whole'}"]
    output = finish(start(2, changed), expected=1)
    assert re.search(r"cannot resume .* with run.init_from=\S+ \(was \S+\); change it back", output)
    with pytest.raises(ConfigError, match=r"run.init_from=\S+ has no checkpoint: there is none"):
        parse_config([*arguments, "run.resume=never"])


def test_settings_come_from_the_source(base: Path, text: Path) -> None:
    """Without config= all settings and the name do; with it, only those of the model."""
    arguments = [f"run.init_from={base}/", f"data.path={text}"]
    one_rank = "parallel.tensor_model_parallel_size=1"
    config = parse_config([*arguments, one_rank])
    assert (config.run.name, config.run.directory) == ("base_2", str(base.parent))
    assert config.run.init_from == str(base)
    assert config.data.tokenizer == str(base / "tokenizer.model")
    assert config.train.train_steps == BASE_STEP
    step = f"run.init_from={base / 'checkpoints' / 'step_00000015'}"
    with pytest.raises(ConfigError, match=r"gpt_7b.yaml:\d+: cannot .*num_layers=32 \(was 2\)"):
        parse_config([*arguments, "config=gpt_7b", step, "data.source=text"])
    mine = base.parent / "mine.yaml"
    mine.write_text("train:\n  global_batch_size: 8\nmodel:\n  num_query_groups: 4\n")
    other = parse_config([*arguments, f"config={mine}", step, "data.source=text"])
    assert (other.model, other.data.vocab_size) == (config.model, 331)
    assert (other.run.name, other.train.train_steps) == ("mine", 1000)


def test_loading_a_source_imports_no_torch(base: Path, text: Path, tmp_path: Path) -> None:
    program = f"{PROGRAM}; assert 'torch' not in sys.modules"
    assert _python("-c", program, *second(base, tmp_path, text)).stdout == "started\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.init_from={0}/nowhere"], r"has no checkpoint: there is none in \S+/nowhere/chec"),
        (["run.init_from={0}"], "has no checkpoint"),
        (
            ["run.init_from={0}/base/checkpoints/step_00000007"],
            "does not exist; .* has steps 30, 15",
        ),
        (["run.name=base"], r"run.init_from=\S+ is the folder of this run; choose another run.n"),
        (["run.init_from=null", "run.init_optimizer=true", "config=gpt_debug"], "no effect alone"),
        (["model.num_layers=3"], r"from \S+step_00000030 with model.num_layers=3 \(was 2\);"),
        (["model.rotary_base=5", "data.vocab_size=400"], r"base=5.0 \(was 10000.0\), .*=400 \(was"),
        (["model.ffn_hidden_size=64"], r"model.ffn_hidden_size=64 \(was 128\)"),
        (
            ["data.tokenizer={0}/other.model"],
            r"tokenizer=\S+ is not the tokenizer \S+base/tok",
        ),
        (["data.tokenizer={0}/json"], "is not the tokenizer"),
        (["data.bos_token=<s>"], r"data.bos_token=<s> \(was null\)"),
    ],
)
def test_wrong_settings_are_refused(
    copy: Path, text: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    """Before torch is imported."""
    (tmp_path / "other.model").write_bytes(small_tokenizer().content)
    (tmp_path / "json").mkdir()
    write_json_tokenizer(tmp_path / "json", "llama3")
    arguments = second(copy, tmp_path, text, *(o.format(tmp_path) for o in overrides))
    with pytest.raises(ConfigError, match=message):
        parse_config(arguments)


def test_damaged_sources(copy: Path, text: Path, tmp_path: Path) -> None:
    """A damaged checkpoint is skipped, or is an error if it is the only one."""
    newest, older = (copy / "checkpoints" / f"step_{step:08}" for step in (30, 15))
    (newest / "manifest.json").write_text("{")
    train_on(ONE_RANK, second(copy, tmp_path, text, "train.train_steps=1"))
    assert newest_state(tmp_path / "test")["progress"]["origin"]["step"] == 15
    again = second(copy, tmp_path, text, "run.resume=never", "run.init_optimizer=true")
    with pytest.raises(ConfigError, match=r"cannot be read: \S+30/manifest.json: JSONDecodeError"):
        parse_config([*again, f"run.init_from={newest}"])
    file = next(older.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    run_on(ONE_RANK, expect_damage, config=parse_config(again))
    (older / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot be read: .*JSONDecodeError"):
        parse_config(again)


def expect_damage(mesh: Mesh, config: Config) -> None:
    with (
        RunFolder(config, mesh) as folder,
        pytest.raises(UserError, match=r"all 2 checkpoints in .* are damaged"),
    ):
        start_run(config, mesh, folder)


@pytest.mark.slow
def test_a_stage_after_an_import(text: Path, tmp_path: Path) -> None:
    """The stage equals the imported run, which has no optimizer state."""
    hf_model("Llama").save_pretrained(tmp_path / "hf")
    write_json_tokenizer(tmp_path / "hf", "llama3")
    source = tmp_path / "imported"
    run_on(ONE_RANK, import_on, settings=Settings(source=str(tmp_path / "hf"), run=str(source)))
    arguments = [
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.train_steps=2",
        "train.precision=fp32",
        "train.compile=false",
        "data.source=text",
        f"data.path={text}",
        f"data.cache_directory={tmp_path / 'cache'}",
        "evaluate.sample_tokens=0",
        "logging.wandb=disabled",
    ]
    new = [f"run.init_from={source}", f"run.directory={tmp_path}", "run.name=test"]
    with pytest.raises(ConfigError, match=r"init_optimizer=true needs optimizer state, but"):
        parse_config([*new, *arguments, "run.init_optimizer=true"])
    train_on(Layout(tp=2), [*new, *arguments])
    train_on(Layout(tp=2), [f"config={source / 'config.yaml'}", *arguments])
    assert rows(tmp_path, "imported") == rows(tmp_path)
    assert newest_state(tmp_path / "test")["progress"]["origin"]["step"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_documented_commands_run(tmp_path: Path) -> None:
    """Every command of docs/stages.md as written, in order."""
    for path in ROOT.glob("[!.]*"):
        if path.name not in ("runs", "exports"):
            (tmp_path / path.name).symlink_to(path)
    page = (ROOT / "docs" / "stages.md").read_text("utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S):
        printed = run_block("sh", block, tmp_path)
    assert len(re.findall(r"^runs/decayed_[24]0.*eval/loss", printed, re.M)) == 2
    for step in (20, 40):
        branch = rows(tmp_path / "runs", f"decayed_{step}")
        rates = [row["train/learning_rate"] for row in branch if "train/loss" in row]
        assert rates == pytest.approx([2e-3 - 2e-4 * n for n in range(10)])
        state = newest_state(tmp_path / "runs" / f"decayed_{step}")
        assert state["progress"]["origin"]["step"] == step
