"""Settings of the programs other than train.py: values, errors and help."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from configs import ConfigError, Range, Text, exit_on_config_error, parse_config, to_yaml
from configs.program_settings import load_settings, parse_settings, run_config


@dataclass(frozen=True)
class Settings:
    """Say something about a run."""

    run: str  # the folder of a run
    prompt: Text | None = None  # what to say
    # Tokens of a line,
    # at most.
    max_new_tokens: int = 100
    top_k: int | None = None  # null: all
    temperature: float = 1.0  # 0: none
    precision: Literal["fp32", "bf16"] | None = None  # null: the run's
    tensor_model_parallel_size: int | None = None  # null: the number of ranks
    RANGES: ClassVar[dict[str, Range]] = {"top_k": Range(1), "temperature": Range(0)}

    def __post_init__(self) -> None:
        if self.top_k and self.temperature == 0:
            raise ConfigError("top_k has no meaning for temperature=0; leave it out")


KEYS = (
    "choose from run, prompt, max_new_tokens, top_k, temperature, precision, "
    "tensor_model_parallel_size (--help describes them)"
)
ERRORS = [
    ("top_k=abc", "top_k=abc is not an integer or null; write for example 100"),
    ("top_k=0", "top_k=0 is out of range; it must be at least 1"),
    ("temperature=hot", "temperature=hot is not a finite number; write for example 1.0"),
    ("temperature=-1", "temperature=-1.0 is out of range; it must be at least 0"),
    ("precision=fp16", "precision=fp16 is not one of fp32, bf16 or null"),
    ("max_tokens=5", "max_tokens=5: there is no key max_tokens; did you mean max_new_tokens?"),
    ("temp=5", "temp=5: there is no key temp; did you mean temperature?"),
    ("dtype=fp32", "dtype=fp32: there is no key dtype; did you mean precision=fp32?"),
    ("model.top_k=5", "model.top_k=5: there is no key model.top_k; did you mean top_k?"),
    ("xyz=5", f"xyz=5: there is no key xyz; {KEYS}"),
    ("model.num_layers=5", "model.num_layers=5 is a setting of the run; its config.yaml sets it"),
    ("--top_k=5", "--top_k=5 has dashes; write top_k=5"),
    (
        "prompt",
        "prompt has no '='; write prompt=value, without spaces or dashes (all keys: --help)",
    ),
    (
        "hello",
        "hello has no '='; write key=value, without spaces or dashes (all keys: --help)",
    ),
    ("run=", "run is empty; give a value"),
    ("prompt=\udcff", "prompt='\\udcff' is not valid UTF-8; write it in UTF-8"),
]


@pytest.mark.parametrize(("argument", "message"), ERRORS)
def test_error_of_an_argument(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(Settings, ["run=runs/x", argument])
    assert str(caught.value) == message


def test_relations_and_required_keys() -> None:
    """`__post_init__` checks relations."""
    with pytest.raises(ConfigError, match="top_k has no meaning for temperature=0"):
        parse_settings(Settings, ["run=x", "top_k=3", "temperature=0"])
    with pytest.raises(ConfigError, match="run=RUN is required: the folder of a run"):
        parse_settings(Settings, ["top_k=3"])


def test_values_have_the_types_of_their_fields() -> None:
    """Text is literal; a key that train.py has too may name its section; the last value counts."""
    arguments = ["run=~/x", "top_k=1e3", "top_k=null", "precision=bf16", "temperature=2"]
    arguments += ["parallel.tensor_model_parallel_size=2"]
    settings = parse_settings(Settings, arguments)
    expected = Settings("~/x", None, 100, None, 2.0, "bf16", 2)
    assert settings == expected
    assert isinstance(settings.temperature, float)
    for prompt in ("null", "~", "", '"quoted"', "${HOME} = a", " \n", "None"):
        assert parse_settings(Settings, ["run=x", f"prompt={prompt}"]).prompt == prompt


def test_help_comes_from_the_class(capsys: pytest.CaptureFixture[str]) -> None:
    """Its docstring, and each field with its comment; the exit code is 0."""
    with pytest.raises(SystemExit) as ended:
        load_settings(Settings, ["run=x", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "Usage: python test_cli.py key=value ...\n\nSay something about a run.\n\n"
        "  run  (string; required)\n      the folder of a run\n"
    )
    assert "  max_new_tokens  (integer; default 100)\n      Tokens of a line, at" in text
    assert "  precision  (one of fp32, bf16 or null; default null)\n      null: the run's\n" in text


def test_an_error_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2 and one line."""
    with pytest.raises(SystemExit) as ended:
        load_settings(Settings, ["run=x", "top_k=0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("config error: top_k=0 is out of range")


def test_the_configuration_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is for the ranks of this launch; a wrong folder or layout is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    config = parse_config(["config=gpt_debug", "train.global_batch_size=12"])
    (tmp_path / "runs/mine/config.yaml").write_text(to_yaml(config))
    assert run_config("runs/mine").parallel.tensor_model_parallel_size == 1
    with pytest.raises(ConfigError, match=r"run=mine is not a run.*did you mean run=runs/mine\?"):
        run_config("mine")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_config("runs/mine").parallel.tensor_model_parallel_size == 4
    config = run_config("runs/mine", 2, micro_batch_size=8)
    assert (config.parallel.tensor_model_parallel_size, config.train.micro_batch_size) == (2, 8)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit), exit_on_config_error():
        run_config("runs/mine")
    assert "num_attention_heads=4 is not divisible by parallel.t" in capsys.readouterr().err
