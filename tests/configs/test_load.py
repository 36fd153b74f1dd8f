"""Loading: what wins, how texts become values, what is shipped, and how a process ends."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from configs import Config, ConfigError, flatten, parse_config, read_config, to_yaml
from configs.fields import KEYS
from configs.inputs import SOURCE_EXTENSIONS
from configs.layout import check_layout, last_chunk
from configs.schema import TrainConfig
from configs.usage import SHIPPED, config_list, usage
from configs.validate import RANGES
from tests.lines import ROOT

PROGRAM = "import sys; from configs import load_config; load_config(sys.argv[1:]); print('started')"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory of its own, and no torchrun around us."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def _python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults() -> None:
    """One key from each of the three."""
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
def test_a_text_is_read_by_the_type_of_its_key(argument: str, value: object) -> None:
    """Where YAML would guess, the key decides."""
    key = argument.partition("=")[0]
    found = flatten(parse_config(["config=gpt_debug", argument]))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["", "# nothing yet\n", "model:\n", "model: null\n", "model: {}\n"]
)
def test_an_empty_file_or_section_means_the_defaults(text: str) -> None:
    """A file in which everything is commented out is a valid one."""
    Path("mine.yaml").write_text(text)
    config = parse_config(["config=mine.yaml"])
    expected = Config()
    assert config == dataclasses.replace(
        expected, run=dataclasses.replace(expected.run, name="mine")
    )


def test_a_file_here_wins_over_a_shipped_one() -> None:
    """config=NAME.yaml is looked up as given first."""
    Path("gpt_debug.yaml").write_text("run:\n  seed: 99\n")
    assert parse_config(["config=gpt_debug"]).run.seed == 99


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_starts_as_one_process_from_anywhere(path: Path) -> None:
    """Each has a description, takes its name as the run's, needs one rank, and can be exported."""
    config = parse_config([f"config={path.name}"])
    assert config.run.name == path.stem
    assert config.parallel.tensor_model_parallel_size == 1
    # What GPT2LMHeadModel and LlamaForCausalLM compute.
    expected = "swiglu" if path.stem.startswith("llama") else "gelu_tanh"
    assert config.model.activation == expected
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("gpt_125m", 8), ("gpt_1b", 64), ("gpt_7b", 64), ("llama_1b", 64)],
)
def test_shipped_files_start_on_whole_nodes(name: str, ranks: int) -> None:
    """Every power of two up to eight is a tensor-parallel size, unless heads do not divide."""
    config = parse_config([f"config={name}"])
    for size in (1, 2, 4, 8):
        if config.model.num_attention_heads % size == 0:
            parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=size)
            check_layout(dataclasses.replace(config, parallel=parallel), ranks)


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
def test_any_text_survives_being_written(prompt: str) -> None:
    """Whatever YAML would make of it unquoted."""
    config = parse_config(["config=gpt_debug"])
    evaluate = dataclasses.replace(config.evaluate, sample_prompt=prompt)
    config = dataclasses.replace(config, evaluate=evaluate)
    Path("config.yaml").write_text(to_yaml(config))
    assert read_config(Path("config.yaml")) == config
    assert yaml.safe_load(to_yaml(config))["evaluate"]["sample_prompt"] == prompt


def test_a_run_of_many_ranks_can_be_read_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluating a run needs neither its ranks nor its corpus."""
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
    """What the data package will read is accepted here."""
    name = f"deep/below{SOURCE_EXTENSIONS[source][0]}"
    Path("deep").mkdir()
    Path(name).touch()
    for path in (name, "deep/*", ".", "**/below*"):
        parse_config(["config=gpt_debug", f"data.source={source}", f"data.path={path}"])


def test_pieces_are_cut_as_torch_does() -> None:
    """The last of `parts` pieces; worked out by hand."""
    assert [last_chunk(*cut) for cut in [(603, 2), (5, 4), (8, 4), (3, 2), (1, 2)]] == [
        301,
        0,
        2,
        1,
        0,
    ]


def test_every_number_has_a_range() -> None:
    """A key without one would accept -1."""
    numbers = {name for name, field in KEYS.items() if field.hint in (int, float)}
    assert numbers == set(RANGES)


def test_help_names_every_key_and_every_shipped_file() -> None:
    """The comments of the schema are the documentation, including those above a key."""
    text = usage()
    assert all(f"  {key}  (" in text for key in KEYS)
    assert config_list() in text
    assert KEYS["optimizer.lr"].comment == "peak learning rate"
    assert KEYS["parallel.gradient_sync"].comment.startswith("When gradients are reduced")
    assert KEYS["model.num_attention_heads"].comment == ""


@pytest.mark.parametrize("argument", ["--help", "-h", "help", "config=list"])
def test_information_exits_with_0(argument: str) -> None:
    """On stdout, and nothing else on it."""
    done = _python("-c", PROGRAM, argument)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gpt_laptop.yaml" in done.stdout
    assert "started" not in done.stdout


def test_a_wrong_key_costs_no_import_of_torch() -> None:
    """One line, exit code 2, and no waiting."""
    started_at = time.perf_counter()
    done = _python("-c", PROGRAM, "config=gpt_debug", "lr=1")
    elapsed_s = time.perf_counter() - started_at
    message = "config error: lr=1: there is no key lr; did you mean optimizer.lr?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert elapsed_s < 1.5


def test_loading_imports_no_torch() -> None:
    """Nor anything that would."""
    program = f"{PROGRAM}; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    assert _python("-c", program, "config=gpt_debug").stdout == "started\n"


def test_under_torchrun_an_error_is_printed_once_and_is_the_root_cause() -> None:
    """Rank 0 prints; torchrun shows the same line in place of a traceback."""
    Path("program.py").write_text(PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0")
    done = _python(*torchrun, "program.py", "config=gpt_debug", "lr=1")
    message = "config error: lr=1: there is no key lr; did you mean optimizer.lr?"
    assert done.stderr.splitlines().count(message) == 1
    _, root_cause = done.stderr.split("Root Cause")
    assert f"traceback : {message}\n" in root_cause
    assert "exitcode  : 2 " in root_cause
    assert done.stdout == ""


def test_two_configs_are_refused() -> None:
    """The second would silently start another model."""
    with pytest.raises(
        ConfigError, match="config is given twice, as gpt_debug and gpt_1b; give one"
    ):
        parse_config(["config=gpt_debug", "config=gpt_1b"])


def test_the_last_of_two_settings_counts() -> None:
    """A script can add to a command line without knowing what is in it."""
    assert parse_config(["config=gpt_debug", "run.seed=5", "run.seed=6"]).run.seed == 6


def test_waiting_threads_sleep_soon_unless_the_user_has_a_policy() -> None:
    """libgomp reads the environment when torch is imported, after the settings are loaded."""
    program = f"{PROGRAM}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    variables = {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {}
    printed = [_python("-c", program, "config=gpt_debug", **given).stdout for given in variables]
    assert printed == ["started\nNone\n", "started\n5\n", "started\n3000\n"]
