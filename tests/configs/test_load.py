"""Loading: precedence, types, shipped files, run folders, help and exit codes."""

import dataclasses
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs import Config, ConfigError, flatten, parse_config, read_config, to_yaml
from configs.__main__ import settings_table
from configs.cli import config_list, usage
from configs.fields import KEYS
from configs.init_from import config_of_source
from configs.launch import threads_per_rank
from configs.layout import check_layout, last_chunk
from configs.load import SHIPPED, current_name
from configs.program_settings import run_config
from configs.schema import REMOVED, RENAMED, RunConfig, TrainConfig
from configs.validate import SOURCE_EXTENSIONS, check_inputs
from configs.weights import num_parameters
from tests.data_corpora import small_tokenizer, write_json_tokenizer
from tests.lines import ROOT

PROGRAM = "import sys; from configs import load_config; load_config(sys.argv[1:]); print('started')"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty directory, without torchrun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # set by load_config in other tests


def _python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults() -> None:
    """One key of each."""
    Path("mine.yaml").write_text("train:\n  train_steps: 7\n  global_batch_size: 24\n")
    config = parse_config(["config=mine", "train.train_steps=9"])
    assert config.train == TrainConfig(train_steps=9, global_batch_size=24)
    assert config.train.micro_batch_size == TrainConfig().micro_batch_size


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train.train_steps=1e4", 10_000),
        ("train.train_steps=2.5e3", 2500),
        ("train.train_steps=4.0", 4),
        ("train.train_steps=1_000", 1000),
        ("train.train_steps= 5 ", 5),
        ("optimizer.weight_decay=1", 1.0),
        ("optimizer.lr=1e-3", 0.001),
        ("optimizer.lr=.001", 0.001),
        ("parallel.sequence_parallel=False", False),
        ("model.ffn_hidden_size=null", None),
        ("run.name=007", "007"),
        ("run.name=off", "off"),
        ("run.name='null'", "null"),
        ("evaluate.sample_prompt=", ""),
        ("evaluate.sample_prompt= a: #b", " a: #b"),
        ('evaluate.sample_prompt="a\\nb"', "a\nb"),
        ("evaluate.sample_prompt='", "'"),
    ],
)
def test_a_value_is_converted_by_the_type_of_its_key(argument: str, value: object) -> None:
    """YAML would guess the type of each."""
    key = argument.partition("=")[0]
    found = flatten(parse_config(["config=gpt_debug", argument]))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["", "# nothing yet\n", "model:\n", "model: null\n", "model: {}\n"]
)
def test_an_empty_file_or_section_means_the_defaults(text: str) -> None:
    """A file in which everything is commented out is valid."""
    Path("mine.yaml").write_text(text)
    config = parse_config(["config=mine.yaml"])
    expected = Config()
    assert config == dataclasses.replace(
        expected,
        run=dataclasses.replace(expected.run, name="mine"),
        data=dataclasses.replace(expected.data, vocab_size=8192),  # of a trained tokenizer
    )


def test_a_file_here_wins_over_a_shipped_one() -> None:
    """config=NAME.yaml is first looked up as given."""
    Path("gpt_debug.yaml").write_text("run:\n  seed: 99\n")
    assert parse_config(["config=gpt_debug"]).run.seed == 99


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_starts_as_one_process_from_anywhere(path: Path) -> None:
    """Each has a description, names the run, needs one rank, and can be exported."""
    config = parse_config([f"config={path.name}"])
    assert config.run.name == path.stem
    assert config.parallel.tensor_model_parallel_size == 1
    # The activations of GPT2LMHeadModel and of the families with rotary positions.
    expected = "swiglu" if path.stem.startswith(("llama", "qwen", "gpt_laptop")) else "gelu_tanh"
    assert config.model.activation == expected
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *(("gpt_125m", 8), ("gpt_1b", 64), ("gpt_7b", 64), ("llama_1b", 64)),
        *(("qwen3_0.6b", 64), ("llama3.2_1b", 64)),
    ],
)
def test_shipped_files_start_on_whole_nodes(name: str, ranks: int) -> None:
    """Every power of two up to eight is a tensor-parallel size, unless heads do not divide."""
    config = parse_config([f"config={name}"])
    for size in (1, 2, 4, 8):
        if config.model.num_attention_heads % size == 0:
            parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=size)
            check_layout(dataclasses.replace(config, parallel=parallel), ranks)


@pytest.mark.parametrize(
    ("name", "number"), [("qwen3_0.6b", 596_049_920), ("llama3.2_1b", 1_235_814_400)]
)
def test_published_models_have_the_published_size(name: str, number: int) -> None:
    """The numbers of elements in the safetensors files on the hub, with a tied head once."""
    config = parse_config([f"config={name}"])
    assert num_parameters(config.model, config.data.padded_vocab_size) == number


def test_llama_1b_is_a_billion_parameters() -> None:
    """Counted by hand: tied embedding, and in each block q, kv, proj, 3 h x f and two norms."""
    model, v = parse_config(["config=llama_1b"]).model, 32768
    h, f, d, g = model.hidden_size, model.ffn_size, 64, 8
    block = 2 * h * h + 2 * g * d * h + 3 * h * f + 2 * h
    assert 1.0e9 < v * h + model.num_layers * block + h < 1.1e9


def test_gpt_1b_is_a_billion_parameters() -> None:
    """Counted by hand: embedding, positions, and in each block 4 h x h, 2 h x f and the rest."""
    model, v = parse_config(["config=gpt_1b"]).model, 32768
    h, f = model.hidden_size, model.ffn_size
    block = 4 * h * h + 4 * h + 2 * h * f + f + h + 4 * h
    assert 1.0e9 < v * h + model.seq_length * h + model.num_layers * block + 2 * h < 1.1e9


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_written_configuration_reads_back_the_same(path: Path) -> None:
    """config.yaml in the run folder is the configuration, with the run's name filled in."""
    config = parse_config([f"config={path.name}", "optimizer.adam_eps=1e-12"])
    Path("config.yaml").write_text(to_yaml(config))
    assert parse_config(["config=config.yaml"]) == config
    assert read_config(Path("config.yaml")) == config


@pytest.mark.parametrize(
    "prompt", ["def ", "", "null", "a\n\t'\"b", "# é ☃ \x00", "1e4", " x " * 99]
)
def test_any_string_reads_back_the_same(prompt: str) -> None:
    """YAML would read some of them differently without quotes."""
    config = parse_config(["config=gpt_debug"])
    evaluate = dataclasses.replace(config.evaluate, sample_prompt=prompt)
    config = dataclasses.replace(config, evaluate=evaluate)
    Path("config.yaml").write_text(to_yaml(config))
    assert read_config(Path("config.yaml")) == config
    assert yaml.safe_load(to_yaml(config))["evaluate"]["sample_prompt"] == prompt


def test_a_run_of_many_ranks_can_be_read_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation needs neither the ranks nor the corpus."""
    Path("corpus.txt").write_text("text")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    settings = ["parallel.tensor_model_parallel_size=2", "data.source=text", "data.path=corpus.txt"]
    config = parse_config(["config=gpt_debug", *settings])
    Path("config.yaml").write_text(to_yaml(config))
    Path("corpus.txt").unlink()
    monkeypatch.delenv("RANK")
    assert read_config(Path("config.yaml")) == config


@pytest.mark.parametrize("source", SOURCE_EXTENSIONS)
def test_a_source_may_be_a_file_a_glob_or_a_folder(source: str) -> None:
    """All that the data package can read is accepted."""
    name = f"deep/below{SOURCE_EXTENSIONS[source][0]}"
    Path("deep").mkdir()
    Path(name).touch()
    Path("t.model").write_bytes(small_tokenizer().content)  # which a tokenized source needs
    for path in (name, "deep/*", ".", "**/below*"):
        arguments = [f"data.source={source}", f"data.path={path}", "data.tokenizer=t.model"]
        parse_config(["config=gpt_debug", *arguments])


def test_last_chunk_equals_torch() -> None:
    """Sizes of the last chunk, worked out by hand."""
    assert [last_chunk(*cut) for cut in [(603, 2), (5, 4), (8, 4), (3, 2), (1, 2)]] == [
        301,
        0,
        2,
        1,
        0,
    ]


def test_every_number_has_a_range() -> None:
    """A number without a range would accept -1."""
    numbers = {name for name, field in KEYS.items() if field.hint in (int, float)}
    assert numbers == {name for name, field in KEYS.items() if field.range}


def test_help_names_every_key_and_every_shipped_file() -> None:
    """Help texts are the comments behind or above the fields of the schema."""
    text = usage()
    assert all(f"  {key}  (" in text for key in KEYS)
    assert config_list() in text
    assert KEYS["optimizer.lr"].comment == "Peak learning rate"
    assert KEYS["parallel.gradient_sync"].comment.startswith("Reduce gradients over data-parallel")
    assert (
        "  run.directory  (string; default runs)\n      Folder that holds the run folders\n" in text
    )
    assert "  optimizer.lr  (number; default 0.0006)\n" in text
    assert "  train.compile  (true or false; default true)\n" in text
    assert KEYS["parallel.shared_memory"].comment.startswith("CPU only: ")


def test_every_setting_has_a_help_text_and_a_row_in_the_table() -> None:
    """`python -m configs` prints the table of docs/settings.md."""
    assert [key for key, field in KEYS.items() if not field.comment] == []
    table = _python("-m", "configs").stdout
    assert table.endswith(settings_table())
    head, line, *rows = settings_table().splitlines()
    assert (head, line) == ("| section | key | type | default | meaning |", "|" + " --- |" * 5)
    assert [".".join(row.split(" | ")[:2]).lstrip("| ") for row in rows] == list(KEYS)
    assert "| optimizer | lr | number | 0.0006 | Peak learning rate |" in rows


@pytest.mark.parametrize(
    "argument",
    ["--help", "config=list", *(pytest.param(a, marks=pytest.mark.slow) for a in ("-h", "help"))],
)
def test_information_exits_with_0(argument: str) -> None:
    """It goes to stdout, alone."""
    done = _python("-c", PROGRAM, argument)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gpt_laptop.yaml" in done.stdout
    assert "started" not in done.stdout


def test_a_wrong_key_is_reported_before_torch_is_imported() -> None:
    """One line and exit code 2, quickly."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = _python("-c", PROGRAM, "config=gpt_debug", "lr=1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    message = "config error: lr=1: there is no key lr; did you mean optimizer.lr?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    # Its own time, as the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_loading_imports_no_torch() -> None:
    """Nor numpy."""
    program = f"{PROGRAM}; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    assert _python("-c", program, "config=gpt_debug").stdout == "started\n"


def test_under_torchrun_an_error_is_printed_once_and_is_the_root_cause() -> None:
    """Rank 0 prints; torchrun shows the same line instead of a traceback."""
    Path("program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0")
    done = _python(*torchrun, "program.py", "config=gpt_debug", "lr=1")
    message = "config error: lr=1: there is no key lr; did you mean optimizer.lr?"
    assert done.stderr.splitlines().count(message) == 1
    _, root_cause = done.stderr.split("Root Cause")
    assert f"traceback : {message}\n" in root_cause
    assert "exitcode  : 2 " in root_cause
    assert done.stdout == ""


def test_the_last_value_of_a_key_counts() -> None:
    """A script can append to a command line without knowing what is in it; so for config."""
    assert parse_config(["config=gpt_debug", "run.seed=5", "run.seed=6"]).run.seed == 6
    assert parse_config(["config=gpt_1b", "config=gpt_debug"]).model.num_layers == 2
    arguments = ["config=gpt_debug", "optimizer.min_lr=1e-5", "optimizer.min_lr=null"]
    assert parse_config(arguments).optimizer.min_lr is None


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_works_and_warns_once(
    old: str, new: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line, in a file, and in a run folder."""
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    current_name.cache_clear()
    section, leaf = old.split(".")
    Path("config.yaml").write_text(f"{section}:\n  {leaf}: 3\n")
    configs = [
        parse_config(["config=gpt_debug", f"{old}=3"]),
        parse_config(["config=config.yaml"]),
        read_config(Path("config.yaml")),
    ]
    assert [flatten(config)[new] for config in configs] == [3, 3, 3]
    warning = f"{old} is now called {new}; the old name still works"
    assert [record.message for record in caplog.records] == [warning]
    Path("config.yaml").write_text(f"{section}:\n  {leaf}: x\n")
    with pytest.raises(ConfigError, match=rf"^config.yaml:2: {new}=x is not"):
        read_config(Path("config.yaml"))


def test_a_removed_key_is_ignored_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in a file."""
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    current_name.cache_clear()
    (key,) = REMOVED
    section, leaf = key.split(".")
    Path("config.yaml").write_text(f"{section}:\n  {leaf}: false\n")
    parse_config(["config=config.yaml", f"{key}=true"])
    warning = f"{key} no longer exists and is ignored; remove it"
    assert [record.message for record in caplog.records] == [warning]


def test_a_removed_value_means_the_default(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and in a file, with a warning."""
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    Path("config.yaml").write_text("parallel:\n  tp_comm_overlap: both\n")
    for arguments in (
        ["config=config.yaml"],
        ["config=gpt_debug", "parallel.tp_comm_overlap=both"],
    ):
        assert parse_config(arguments).parallel.tp_comm_overlap == "backward"
    warning = "parallel.tp_comm_overlap=both no longer exists; using backward"
    assert [record.message for record in caplog.records] == [warning] * 2


def _write_run(folder: Path, *arguments: str) -> str:
    config = parse_config(["config=gpt_debug", *arguments])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return f"config={folder}/config.yaml"


def test_the_configuration_of_a_run_folder_is_that_run_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the overrides of its last launch, except the ones that concern that launch only."""
    monkeypatch.setattr(logging.getLogger("microtron"), "propagate", True)
    overrides = ["run.name=mine", "run.seed=5", "run.resume=never", "run.stop_at_step=3"]
    run = _write_run(Path("runs/mine"), *overrides)
    assert parse_config([run]).run == RunConfig(name="mine", seed=5)
    assert parse_config([run, "run.name=other"]).run.name == "other"
    assert parse_config([run, "run.resume=must"]).run.resume == "must"
    assert {record.message for record in caplog.records} == {
        "using the settings of run mine from runs/mine/config.yaml, with the overrides of its last "
        "launch, except run.resume and run.stop_at_step"
    }


def test_the_tokenizer_of_a_run_folder_replaces_a_missing_one(tmp_path: Path) -> None:
    """Of a run that was renamed or whose source is gone: training goes on with the copy."""
    mine, other, copy = tmp_path / "mine.model", tmp_path / "other.model", Path("copy.model")
    for path in (mine, other, copy):
        path.write_bytes(small_tokenizer().content)
    run = _write_run(Path("runs/mine"), "run.name=mine", f"data.tokenizer={mine}")
    copy = copy.rename("runs/mine/tokenizer.model")
    assert parse_config([run]).data.tokenizer == str(mine)
    mine.unlink()
    assert parse_config([run]).data.tokenizer == "runs/mine"
    assert parse_config([run, f"data.tokenizer={other}"]).data.tokenizer == str(other)
    assert run_config("runs/mine").data.tokenizer == "runs/mine"
    check_inputs(run_config("runs/mine"))
    copy.unlink()
    with pytest.raises(ConfigError, match=r"data\.tokenizer=runs/mine is a folder without"):
        parse_config([run])


def test_the_run_directory_may_be_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quoted or in a file, where no shell expands ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine.yaml").write_text("run:\n  directory: ~/runs\n")
    for arguments in (["config=mine"], ["config=gpt_debug", "run.directory=~/runs"]):
        assert parse_config(arguments).run.directory == f"{tmp_path}/runs"
    assert read_config(Path("mine.yaml")).run.directory == f"{tmp_path}/runs"
    own = tmp_path / "runs" / "base_2"
    (own / "checkpoints" / "step_00000001").mkdir(parents=True)
    given = {"run.init_from": "elsewhere/base", "run.directory": "~/runs"}
    assert config_of_source(given) == str(own / "config.yaml")


def test_the_configuration_of_a_moved_run_folder_needs_a_run_name(tmp_path: Path) -> None:
    """Its run.name would continue in the folder where the run was before."""
    run = _write_run(Path("runs/copy"), "run.name=mine")
    with pytest.raises(ConfigError) as caught:
        parse_config([run])
    assert str(caught.value) == (
        f"config=runs/copy/config.yaml belongs to {tmp_path}/runs/mine; give run.name, and "
        f"run.directory (run.name=copy run.directory={tmp_path}/runs to use this folder)"
    )
    assert parse_config([run, "run.name=copy"]).run.name == "copy"


@pytest.mark.parametrize("variables", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_files_and_arguments_are_utf8_in_the_c_locale(variables: dict[str, str]) -> None:
    """Python decodes arguments as ASCII there, unless it chooses its UTF-8 mode."""
    Path("é.yaml").write_text('run:\n  name: a\nevaluate:\n  sample_prompt: "é☃"\n', "utf-8")
    Path("ü.txt").touch()
    program = (
        "import sys; from configs import load_config; config = load_config(sys.argv[1:]); "
        "print(ascii((config.evaluate.sample_prompt, config.logging.wandb_project)))"
    )
    arguments = ("-c", program, "config=é.yaml", "logging.wandb_project=ü")
    done = _python(*arguments, LC_ALL="C", **variables)
    assert (done.stdout, done.stderr) == ("('\\xe9\\u2603', '\\xfc')\n", "")
    done = _python(*arguments, "data.source=text", "data.path=ü.txt", LC_ALL="C", **variables)
    error = "config error: data.path=\\xfc.txt is not a valid file name in the locale's encoding "
    assert done.stderr.startswith(error) if variables else done.returncode == 0


RANKS, ELASTIC = {"LOCAL_WORLD_SIZE": "4"}, {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("3", {"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "2"}, 3),
        ("null", {"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "2"}, 8),
        ("null", {"SLURM_CPUS_PER_TASK": "8", "LOCAL_WORLD_SIZE": "4"}, 2),
        ("null", {"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_NUM_TASKS": "4"} | RANKS, 8),
        ("null", {"SLURM_CPUS_PER_TASK": "8", "SLURM_STEP_NUM_TASKS": "4"} | RANKS | ELASTIC, 2),
        ("null", {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "4"}, 2),
        ("null", {"OMP_NUM_THREADS": "1"}, 1),
        ("null", {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, 12),
        ("null", {"LOCAL_WORLD_SIZE": "5"}, 2),
        ("null", {"LOCAL_WORLD_SIZE": "50"}, 1),
    ],
)
def test_threads_per_rank(
    setting: str, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting, Slurm, OpenMP (whose 1 is torchrun's own), else the cores of 12."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    config = parse_config(["config=gpt_debug", f"train.num_threads={setting}"])
    assert threads_per_rank(config.train.num_threads, environment) == expected


def test_waiting_threads_sleep_soon_unless_the_user_has_a_policy() -> None:
    """libgomp reads the environment when torch is imported, after the settings are loaded."""
    program = f"{PROGRAM}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    variables = {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {}
    printed = [_python("-c", program, "config=gpt_debug", **given).stdout for given in variables]
    assert printed == ["started\nNone\n", "started\n5\n", "started\n3000\n"]


def test_the_tokenizer_decides_the_vocabulary_size(tmp_path: Path) -> None:
    """data.vocab_size=null is its size, bos and eos come from the files; a larger size is kept."""
    path = write_json_tokenizer(tmp_path, "llama3")
    arguments = ["config=gpt_125m", f"data.tokenizer={tmp_path}", "data.vocab_size=null"]
    data = parse_config(arguments).data
    assert (data.vocab_size, data.bos_token, data.eos_token) == (400, "<s>", "</s>")
    data = parse_config(["config=gpt_125m", f"data.tokenizer={path}"]).data
    assert data.vocab_size == 32768
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().content)
    data = parse_config(arguments).data
    assert (data.vocab_size, data.bos_token) == (320, None)
    assert parse_config(["config=gpt_125m", "data.vocab_size=null"]).data.vocab_size == 8192
    for given, message in (
        (
            [f"data.tokenizer={path}", "data.vocab_size=399"],
            r"data\.vocab_size=399 is less than the 400 ids of data\.tokenizer=.*; set "
            r"data\.vocab_size=null, which takes 400, or a larger number",
        ),
        (
            [f"data.tokenizer={tmp_path}", "data.vocab_size=319"],
            r"data\.vocab_size=319 is less than the 320 ids of data\.tokenizer=",
        ),
        (
            [f"data.tokenizer={tmp_path}", "data.bos_token=<s>"],
            r"data\.bos_token=<s> has no effect with a sentencepiece model, .*null",
        ),
        (["data.eos_token=<s>"], r"data\.eos_token=<s> has no effect with data\.tokenizer=null"),
        (
            [f"data.tokenizer={path}", "data.eos_token=<eos>"],
            r"data\.eos_token=<eos>, but .*tokenizer_config\.json says eos is </s>; set data\.eos",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(["config=gpt_debug", *given])


def test_plan_reads_the_tokenizer_only_for_its_size(tmp_path: Path) -> None:
    """A dry run needs no file if data.vocab_size is given."""
    arguments = ["config=gpt_debug", f"data.tokenizer={tmp_path}/none.json"]
    assert parse_config(arguments, lambda _: 1).data.vocab_size == 1024
    with pytest.raises(ConfigError, match=r"none\.json does not exist"):
        parse_config([*arguments, "data.vocab_size=null"], lambda _: 1)
