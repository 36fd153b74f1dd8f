"""Every wrong setting gives one line that says what is wrong, what is allowed and how to fix it."""

from pathlib import Path

import pytest

from configs import ConfigError, parse_config
from configs.errors import ALIASES, suggest
from configs.fields import KEYS
from configs.load import SHIPPED

SHIPPED_NAMES = f"shipped: {', '.join(path.name for path in SHIPPED)} (config=list describes them)"
SECTIONS = (
    "config, run, model, parallel, data, train, optimizer, evaluate, checkpoint, logging, debug"
)
NO_FOLDER = "cannot be the name of a folder; use 1 to 64 of the characters A-Z a-z 0-9 . _ - and begin with a letter, a digit or _"
GIVE_FILES = "give an existing file, a glob, or a folder with .txt (or compressed) files"
OPTIMIZER_KEYS = "name, lr, muon_lr, muon_momentum, muon_num_ns_steps, min_lr, lr_decay_style, lr_warmup_steps, lr_wsd_decay_steps, weight_decay, adam_beta1, adam_beta2, adam_eps, clip_grad"
TP = "parallel.tensor_model_parallel_size"

# Arguments after config=gpt_debug (4 heads, hidden size 128, batch 16 = 4 x 4), and the error.
ARGUMENTS = [
    # integers
    ("train.global_batch_size=1e40", "train.global_batch_size=1e40 is too large"),
    (f"train.train_steps={'9' * 5000}", f"train.train_steps={'9' * 60}... is too large"),
    (
        "train.train_steps=abc",
        "train.train_steps=abc is not an integer; write for example 1000",
    ),
    (
        "train.train_steps=1.5",
        "train.train_steps=1.5 is not an integer; write for example 1000",
    ),
    (
        "train.train_steps=true",
        "train.train_steps=true is not an integer; write for example 1000",
    ),
    (
        "run.stop_at_step=x",
        "run.stop_at_step=x is not an integer or null; write for example 100",
    ),
    (
        "run.seed=1e99",
        f"run.seed=1{'0' * 59}... is out of range; it must be at least 0 and at most {2**63 - 1}",
    ),
    ("run.seed=1e-9999", "run.seed=1e-9999 is not an integer; write for example 1234"),
    (
        f"run.seed={10**20}",
        f"run.seed={10**20} is out of range; it must be at least 0 and at most {2**63 - 1}",
    ),
    ("run.seed=010", "run.seed=010 is not an integer; write for example 1234"),
    ("run.seed=0x10", "run.seed=0x10 is not an integer; write for example 1234"),
    (
        "run.seed=12:30:45",
        "run.seed=12:30:45 is not an integer; write for example 1234",
    ),
    (
        "run.seed=",
        "run.seed=null is not an integer; write for example 1234",
    ),
    # numbers
    ("optimizer.lr=fast", "optimizer.lr=fast is not a finite number; write for example 0.0006"),
    ("optimizer.lr=.nan", "optimizer.lr=.nan is not a finite number; write for example 0.0006"),
    ("optimizer.lr=inf", "optimizer.lr=inf is not a finite number; write for example 0.0006"),
    ("optimizer.lr=1e999", "optimizer.lr=1e999 is not a finite number; write for example 0.0006"),
    ("optimizer.lr=01", "optimizer.lr=01 is not a finite number; write for example 0.0006"),
    (
        "model.hidden_dropout=10%",
        "model.hidden_dropout=10% is not a finite number; write 0.1",
    ),
    # words
    ("parallel.sequence_parallel=yes", "parallel.sequence_parallel=yes is not true or false"),
    ("logging.wandb=off", "logging.wandb=off is not one of auto, online, offline, disabled"),
    (
        "logging.wandb=null",
        "logging.wandb=null is not one of auto, online, offline, disabled",
    ),
    ("data.path=None", "data.path=None is a string; for no value write null"),
    (
        "data.source=txt",
        "data.source=txt is not one of python_stdlib, text, jsonl, parquet, arrow, megatron, hub; did you mean text?",
    ),
    ("source=txt", "source=txt: there is no key source; did you mean data.source=text?"),
    (
        "optimizer.zzzz=1",
        f"optimizer.zzzz=1: there is no key optimizer.zzzz; the keys of optimizer are: {OPTIMIZER_KEYS}",
    ),
    (
        "run.name=${oc.env:HOME}",
        "run.name=${oc.env:HOME} has a special meaning to OmegaConf; write the value itself",
    ),
    (
        "evaluate.sample_prompt=???",
        "evaluate.sample_prompt=??? has a special meaning to OmegaConf; write the value itself",
    ),
    ("data.path=\udc80", "data.path='\\udc80' is not valid UTF-8; write it in UTF-8"),
    ('run.name="\\q"', 'run.name="\\q" is not valid YAML'),
    ("data.text_field=", "data.text_field is empty; give a value"),
    ("data.path=", "data.path is empty; give a value or null"),
    # ranges
    (
        "train.train_steps=100000000",
        "train.train_steps=100000000 is out of range; it must be at least 0 and at most 99999999",
    ),
    ("model.num_layers=0", "model.num_layers=0 is out of range; it must be at least 1"),
    ("optimizer.adam_eps=0", "optimizer.adam_eps=0.0 is out of range; it must be more than 0"),
    (
        "optimizer.adam_beta2=1",
        "optimizer.adam_beta2=1.0 is out of range; it must be at least 0 and less than 1",
    ),
    (
        f"run.seed={2**63}",
        f"run.seed={2**63} is out of range; it must be at least 0 and at most {2**63 - 1}",
    ),
    ("checkpoint.keep=-1", "checkpoint.keep=-1 is out of range; it must be at least 0"),
    ("logging.log_interval=0", "logging.log_interval=0 is out of range; it must be at least 1"),
    # relations
    (
        "model.hidden_size=130",
        "model.hidden_size=130 is not divisible by model.num_attention_heads=4; choose model.hidden_size=128 or 132, or a divisor of 130 as model.num_attention_heads",
    ),
    (
        "model.num_query_groups=3",
        "model.num_query_groups=3 does not divide model.num_attention_heads=4; choose one of 1, 2, 4",
    ),
    (
        "model.position_embedding_type=rope model.hidden_size=132",
        "model.position_embedding_type=rope needs an even head dimension, not 33 (model.hidden_size=132 / model.num_attention_heads=4); choose model.hidden_size=136, or model.position_embedding_type=learned_absolute",
    ),
    ("model.rotary_base=0", "model.rotary_base=0.0 is out of range; it must be at least 1"),
    (
        "model.position_embedding_type=rope model.kv_channels=33",
        "model.kv_channels=33 is odd, but RoPE rotates pairs of channels; choose model.kv_channels=34",
    ),
    (
        "model.position_embedding_type=rope model.rotary_percent=0.1",
        "model.rotary_percent=0.1 of the 32 channels per head is 3; choose a fraction that gives an even number, since RoPE rotates pairs",
    ),
    (
        "model.rotary_percent=0.5",
        "model.rotary_percent=0.5 has no effect with model.position_embedding_type=learned_absolute; set model.rotary_percent=1.0, or model.position_embedding_type=rope",
    ),
    (
        "model.position_embedding_type=rope model.rope_scaling_factor=32",
        "model.rope_scaling_factor=32.0 has no effect with model.rope_scaling_type=null; set model.rope_scaling_factor=8.0, or model.rope_scaling_type=llama3",
    ),
    (
        "model.position_embedding_type=rope model.rope_scaling_type=llama3 model.rope_low_freq_factor=4",
        "model.rope_high_freq_factor=4.0 is too small; choose more than model.rope_low_freq_factor=4.0",
    ),
    (
        "model.rope_scaling_type=yarn",
        "model.rope_scaling_type=yarn is not one of llama3 or null",
    ),
    (
        "model.seq_length=100000000",
        "model.seq_length=100000000 x model.hidden_size=128 is more than 2^32, so dropout masks would repeat; choose model.seq_length=33554432 or less",
    ),
    (
        "optimizer.min_lr=1",
        "optimizer.min_lr=1.0 is above optimizer.lr=0.002, where the decay to min_lr starts; choose optimizer.min_lr=0.0002 (a tenth) or less, or optimizer.lr_decay_style=constant",
    ),
    (
        "optimizer.lr_wsd_decay_steps=10",
        "optimizer.lr_wsd_decay_steps=10 has no effect with optimizer.lr_decay_style=cosine; set optimizer.lr_wsd_decay_steps=null, or optimizer.lr_decay_style=WSD",
    ),
    ("optimizer.name=sgd", "optimizer.name=sgd is not one of adamw, muon"),
    (
        "optimizer.muon_momentum=0.9",
        "optimizer.muon_momentum=0.9 has no effect with optimizer.name=adamw; set optimizer.muon_momentum=0.95, or optimizer.name=muon",
    ),
    (
        "optimizer.name=muon optimizer.lr=0 optimizer.min_lr=0 optimizer.muon_lr=0.02",
        "optimizer.muon_lr=0.02 follows the schedule of optimizer.lr=0.0, which is always 0; set optimizer.lr above 0, or optimizer.muon_lr=null",
    ),
    (
        "data.vocab_size=256",
        "data.vocab_size=256 is too small to train a tokenizer, which has 256 bytes and special pieces; choose 300 or more, or give data.tokenizer",
    ),
    (
        "data.path=x",
        "data.path=x has no effect with data.source=python_stdlib; set data.path=null, or data.source=text (or jsonl, parquet, arrow, hub)",
    ),
    (
        "data.source=hub",
        "data.path=null, but data.source=hub needs the name of a dataset; set data.path, or data.source=python_stdlib for the embedded corpus",
    ),
    (
        "data.hub_config=en",
        "data.hub_config=en has no effect with data.source=python_stdlib; set data.hub_config=null, or data.source=hub",
    ),
    (
        "data.source=jsonl data.path=x data.hub_split=test",
        "data.hub_split=test has no effect with data.source=jsonl; set data.hub_split=train, or data.source=hub",
    ),
    (
        "data.source=text data.path=x data.text_field=body",
        "data.text_field=body has no effect with data.source=text; set data.text_field=text, or data.source=jsonl (or parquet, arrow, hub)",
    ),
    (
        "data.source=jsonl data.path=x data.messages_field=chat",
        "data.messages_field=chat has no effect with data.format=text; set data.messages_field=messages, or data.format=messages",
    ),
    (
        "data.sequence_mode=pad data.packing=best_fit",
        "data.packing=best_fit has no effect with data.sequence_mode=pad; set data.packing=stream, or data.sequence_mode=pack",
    ),
    (
        "data.format=messages",
        "data.format=messages needs rows with columns, which data.source=python_stdlib does not have; set data.source=jsonl (or parquet, arrow, hub), or data.format=text",
    ),
    (
        "data.source=jsonl data.path=x data.format=messages data.packing=stream",
        "data.packing=stream would cut prompts from their targets; with formats other than text set data.packing=best_fit (or null), or data.sequence_mode=pad",
    ),
    (
        "data.source=hub data.path=x data.format=prompt_completion data.inter_document_masking=false",
        "data.inter_document_masking=false would let targets attend to other documents; with formats other than text set data.inter_document_masking=true (or null), or data.sequence_mode=pad",
    ),
    # files
    (
        "data.source=text data.path=nowhere.txt",
        f"data.path=nowhere.txt does not exist; {GIVE_FILES}",
    ),
    ("data.source=text data.path=*.txt", f"data.path=*.txt matches no file; {GIVE_FILES}"),
    (
        "data.source=text data.path=folder",
        "data.path=folder is a folder without .txt (or compressed) files, which text sources consist of; "
        + GIVE_FILES,
    ),
    (
        "data.source=text data.path=pages",
        "data.path=pages is a folder without .txt (or compressed) files, which text sources consist of; "
        "give an existing file, a glob such as data.path='pages/**/*.md', or a folder with .txt (or compressed) files",
    ),
    (
        "data.source=text data.path=/dev/null",
        f"data.path=/dev/null is neither a file nor a folder; {GIVE_FILES}",
    ),
    (
        "data.tokenizer=nowhere.model",
        "data.tokenizer=nowhere.model does not exist; give a sentencepiece model, a tokenizer.json, or a folder with one of them",
    ),
    ("run.directory=file", "run.directory=file is a file; choose a folder, new or old"),
    # names of runs
    ("run.name=../up", f"run.name=../up {NO_FOLDER}"),
    ("run.name=.hidden", f"run.name=.hidden {NO_FOLDER}"),
    ("run.name=-rf", f"run.name=-rf {NO_FOLDER}"),
    ('run.name="a\\n"', f"run.name='a\\n' {NO_FOLDER}"),
    (f"run.name={'x' * 65}", f"run.name={'x' * 60}... {NO_FOLDER}"),
    # the form of the command line
    (
        "train.train_steps",
        "train.train_steps has no '='; write train.train_steps=value, without spaces or dashes (all keys: --help)",
    ),
    ("--train.train_steps=5", "--train.train_steps=5 has dashes; write train.train_steps=5"),
    ("gpt_1b", "gpt_1b has no '='; write config=gpt_1b"),
    (
        "--config",
        "--config has no '='; write config=value, without spaces or dashes (all keys: --help)",
    ),
    ("-v", "-v has no '='; write key=value, without spaces or dashes (all keys: --help)"),
    (
        "model=small",
        "model=small gives a value to a section; set its keys, such as model.num_layers, or choose a file with config=NAME.yaml",
    ),
    (
        "checkpoint.zzzz=1",
        "checkpoint.zzzz=1: there is no key checkpoint.zzzz; the keys of checkpoint are: save_interval, keep, max_failed_saves, async_save",
    ),
    (
        "foo.bar=1",
        f"foo.bar=1: there is no key foo.bar; choose from {SECTIONS} (--help describes them)",
    ),
]

# An unknown key, and the suggestion.
UNKNOWN = [
    ("model.vocab_size", "data.vocab_size"),
    ("logging.save_interval", "checkpoint.save_interval"),
    ("evaluate.log_interval", "logging.log_interval"),
    ("model.dim", "model.hidden_size"),
    ("lr", "optimizer.lr"),
    ("train.lr", "optimizer.lr"),
    ("optimizer.learning_rate", "optimizer.lr"),
    ("weight_decay", "optimizer.weight_decay"),
    ("seed", "run.seed"),
    ("wandb_project", "logging.wandb_project"),
    ("n_layer", "model.num_layers"),
    ("model.n_layers", "model.num_layers"),
    ("n_head", "model.num_attention_heads"),
    ("n_embd", "model.hidden_size"),
    ("n_kv_heads", "model.num_query_groups"),
    ("rope_theta", "model.rotary_base"),
    ("block_size", "model.seq_length"),
    ("batch_size", "train.global_batch_size or train.micro_batch_size"),
    ("dropout", "model.hidden_dropout or model.attention_dropout"),
    ("tp_size", TP),
    ("max_iters", "train.train_steps"),
    ("warmup_iters", "optimizer.lr_warmup_steps"),
    ("max_grad_norm", "optimizer.clip_grad"),
    ("beta2", "optimizer.adam_beta2"),
    ("eval_interval", "evaluate.interval"),
    ("dtype", "train.precision"),
    ("model.hiddensize", "model.hidden_size"),
    ("Model.Num-Layers", "model.num_layers"),
    ("modle.num_layers", "model.num_layers"),
    ("optimizer.weight_decy", "optimizer.weight_decay"),
    ("learning_rte", "optimizer.lr"),
    ("checkpoint.interval", "checkpoint.save_interval"),
]

# The contents of bad.yaml, and the error.
FILES = [
    (
        "[1, 2]",
        "bad.yaml:1: this is not a mapping of sections; write for example 'train:' and below it, indented, 'train_steps: 100'",
    ),
    ("run:\n  seed: [1]", "bad.yaml:2: run.seed=[1] is not an integer; write for example 1234"),
    (
        "run:\n  seed: {a: 1}",
        "bad.yaml:2: run.seed={...} is not an integer; write for example 1234",
    ),
    (
        "run:\n  seed: 5\n  seed: 6",
        "bad.yaml:3: run.seed is already set; remove one of the two",
    ),
    ("run:\nrun:\n", "bad.yaml:2: run is already set; remove one of the two"),
    (
        "train: [1]",
        "bad.yaml:1: train=[1] gives a value to a section; set its keys, such as train.train_steps, or choose a file with config=NAME.yaml",
    ),
    (
        "model:\n\tnum_layers: 3",
        "bad.yaml:2: is not valid YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
    ),
    ("a: b: c", "bad.yaml:1: is not valid YAML: mapping values are not allowed here"),
    ("--- 1\n--- 2", "bad.yaml:2: is not valid YAML: but found another document"),
    (
        "train: {train_steps: !!int abc}",
        "bad.yaml:1: is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:int'",
    ),
    ("lr: 3", "bad.yaml:1: lr=3: there is no key lr; did you mean optimizer.lr?"),
    (
        "optimizer:\n  # faster\n  learning_rate: 3",
        "bad.yaml:3: optimizer.learning_rate=3: there is no key optimizer.learning_rate; did you mean optimizer.lr?",
    ),
    (
        "run:\n  name: !!python/name:os.system x",
        "bad.yaml:2: is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
    ),
    (
        "run:\n  name: !!python/object/apply:os.system [ls]",
        "bad.yaml:2: is not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    ("? [a]\n: b", "bad.yaml:1: is not valid YAML: found unhashable key"),
    (
        "run:\n  seed:",
        "bad.yaml:2: run.seed=null is not an integer; write for example 1234",
    ),
    (
        "run:\n  directory:",
        "bad.yaml:2: run.directory=null is not a string",
    ),
    (
        "logging:\n  wandb: off",
        "bad.yaml:2: logging.wandb=off is not one of auto, online, offline, disabled",
    ),
    (
        "run:\n  seed: 017",
        "bad.yaml:2: run.seed=017 is not an integer; write for example 1234",
    ),
    (
        "model:\n  num_layers: 4\n  hidden_size: 10",
        "bad.yaml:3: model.hidden_size=10 is not divisible by model.num_attention_heads=12; choose model.hidden_size=12, or a divisor of 10 as model.num_attention_heads",
    ),
    (
        "train:\n  micro_batch_size: 3",
        "bad.yaml:2: train.global_batch_size=32 is not divisible by train.micro_batch_size=3 x data parallel size 1 = 3; choose train.global_batch_size=30 or 33, or train.micro_batch_size=2",
    ),
    (
        "data:\n  source: text\n  path: nowhere",
        f"bad.yaml:3: data.path=nowhere does not exist; {GIVE_FILES}",
    ),
    ("run:\n  name: ../up", f"bad.yaml:2: run.name=../up {NO_FOLDER}"),
    (
        "\x01",
        "bad.yaml: is not valid YAML: unacceptable character #x0001: special characters are not allowed "
        'in "bad.yaml", position 0',
    ),
    (
        "a: &a [x, x]\nb: &b [*a, *a]",
        "bad.yaml:2: is not valid YAML: aliases such as *a are not supported; repeat the value",
    ),
    ("[" * 3000, "bad.yaml: is nested too deeply; sections hold plain values"),
]


@pytest.fixture(autouse=True)
def _alone_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with a file and a folder, without torchrun."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    Path("pages").mkdir()
    for name in ("a.md", "b.md", "c.rst", "README"):
        Path("pages", name).touch()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def _error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_error_of_an_argument(arguments: str, message: str) -> None:
    """There is no file and line in front."""
    assert _error("config=gpt_debug", *arguments.split(" ")) == message


@pytest.mark.parametrize(("key", "meant"), UNKNOWN)
def test_suggestion_for_an_unknown_key(key: str, meant: str) -> None:
    """A longer name in this section, the same name elsewhere, an alias, a near spelling."""
    message = f"{key}=1: there is no key {key}; did you mean {meant}?"
    assert _error("config=gpt_debug", f"{key}=1") == message


@pytest.mark.parametrize(("text", "message"), FILES)
def test_error_of_a_file_names_the_line(text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    assert _error("config=bad.yaml") == message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpt_debg", "did you mean config=gpt_debug.yaml? "),
        ("zzz", ""),
        ("folder", ""),
        ("~nobody/x", ""),
    ],
)
def test_error_of_an_unknown_file_lists_the_shipped_ones(name: str, hint: str) -> None:
    """The nearest name comes first."""
    message = f"config={name} is not a file here or in configs/; {hint}{SHIPPED_NAMES}"
    assert _error(f"config={name}") == message


@pytest.mark.parametrize("arguments", [[], ["config="], ["run.seed=1"]])
def test_config_is_required(arguments: list[str]) -> None:
    assert _error(*arguments) == f"config=NAME.yaml is required; {SHIPPED_NAMES}"


def test_a_name_too_long_for_a_file_is_an_unknown_file() -> None:
    """The user does not see the error of the operating system."""
    assert _error(f"config={'x' * 300}").startswith(f"config={'x' * 60}... is not a file here")
    assert "does not exist; give" in _error("config=gpt_debug", f"data.tokenizer={'x' * 300}")


def test_a_file_must_be_utf8() -> None:
    Path("bad.yaml").write_bytes(b"run:\n  name: \xff")
    assert _error("config=bad.yaml") == "bad.yaml: is not UTF-8 text (byte 13)"


def test_error_of_a_file_name_that_cannot_name_a_run() -> None:
    """Without run.name, the run takes its name from the file."""
    Path("my run.yaml").touch()
    assert (
        _error("config=my run.yaml") == f"run.name=my run (from the file my run.yaml) {NO_FOLDER}"
    )


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_lead_to_existing_keys(alias: str) -> None:
    """Keys of train.py or of another program."""
    programs = {
        "num_samples",
        "output",
        "max_new_tokens",
        "temperature",
        "run",
        "step",
        "source",
        "prompt",
        "path",
    }
    leaves = {key.partition(".")[2] for key in KEYS}
    assert alias not in leaves
    assert set(ALIASES[alias]) <= leaves | set(KEYS) | programs
    meant = suggest(alias, [*KEYS, *programs])
    assert meant is not None
    assert set(meant.split(" or ")) <= {*KEYS, *programs}
