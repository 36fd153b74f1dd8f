"""Imported models keep every byte, and train.py resumes them on any layout."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints import begin_save, commit_save, find_checkpoint, load_tensors
from configs import Config, ModelConfig, UserError, parse_config, read_config
from export import Settings as ExportSettings
from export import export
from import_hf import Settings, find_tokenizer, import_model
from interop.huggingface_config import (
    ARCHITECTURES,
    from_huggingface_config,
    to_huggingface_config,
    unknown_options,
)
from interop.source import download, open_source
from model import build_model
from parallel import Mesh
from tests.data_corpora import small_tokenizer
from tests.distributed import ONE_RANK, Layout, run_on
from tests.memory import forget_peak_memory, peak_memory
from tests.runs import rows, train_on
from train import train
from training.optimizer import build_optimizer, training_tensors
from training.run_folder import RunFolder
from training.signals import StopSignals

VOCAB = 603  # embeddings, an odd number; the tokenizer has 320 pieces
_SHAPE = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _SHAPE | {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2 = _SHAPE | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 37}
_BASE = {"GPT2": _GPT2, **dict.fromkeys(("Llama", "Qwen2", "StableLm"), _LLAMA)}
_BASE["Qwen3"] = _LLAMA | {"head_dim": 24}


def hf_model(kind: str, **options: Any) -> Any:
    """A transformers model with random weights, norms and biases."""
    import transformers  # noqa: PLC0415  takes seconds

    config = getattr(transformers, f"{kind}Config")(**_BASE[kind] | options)
    model = getattr(transformers, ARCHITECTURES[config.model_type])(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


CASES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("Llama", {}, torch.float32),
    "llama, tied, bf16": ("Llama", {"tie_word_embeddings": True}, torch.bfloat16),
    "llama, biases, fp16": ("Llama", {"attention_bias": True, "mlp_bias": True}, torch.float16),
    "gpt2": ("GPT2", {}, torch.float32),
    "gpt2, untied, bf16": ("GPT2", {"tie_word_embeddings": False}, torch.bfloat16),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that transformers saves of each case; several files for Llama."""
    folders = {}
    for name, (kind, options, dtype) in CASES.items():
        folder = tmp_path_factory.mktemp("source")
        size = "20KB" if kind == "Llama" else "1GB"
        hf_model(kind, **options).to(dtype).save_pretrained(folder, max_shard_size=size)
        (folder / "tokenizer.model").write_bytes(small_tokenizer().content)
        folders[name] = folder
    return folders


def import_on(mesh: Mesh, settings: Settings) -> None:
    import_model(settings, mesh)


def load_and_save(mesh: Mesh, run: Path, output: Path) -> None:
    """Load the imported checkpoint as train.py does, and save it on this layout."""
    config = read_config(run / "config.yaml")
    model = build_model(config, mesh)
    tensors = training_tensors(model, build_optimizer(model, config.optimizer))
    checkpoint = find_checkpoint(run / "checkpoints", mesh)
    assert checkpoint is not None
    load_tensors(checkpoint, tensors)
    for name, shard in tensors.items():
        assert name.startswith("parameters.") or not shard.tensor.any(), name
    save = begin_save(output, 0, tensors, checkpoint.state, mesh, background=False)
    commit_save(save, mesh)


def export_on(mesh: Mesh, settings: ExportSettings, config: Config) -> None:
    export(settings, config, mesh)


def stored_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    """The dtype, shape and bytes of every tensor in the safetensors files of a folder."""
    stored = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                data = tensor.flatten().view(torch.uint8).numpy().tobytes()
                stored[name] = (f"{tensor.dtype} {tuple(tensor.shape)}", data)
    return stored


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_round_trip_preserves_every_byte(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Imported, loaded and saved at TP=2 x DP=2, exported."""
    run = tmp_path / "run"
    run_on(ONE_RANK, import_on, settings=Settings(source=str(sources[name]), run=str(run)))
    run_on(Layout(tp=2, dp=2), load_and_save, run=run, output=tmp_path / "again/checkpoints")
    (tmp_path / "again/tokenizer.model").write_bytes((run / "tokenizer.model").read_bytes())
    dtype = str(CASES[name][2]).removeprefix("torch.")
    settings = ExportSettings(
        run=str(tmp_path / "again"),
        output=str(tmp_path / "out"),
        dtype=dtype,  # type: ignore[arg-type]
        check=False,
    )
    config = read_config(run / "config.yaml")
    run_on(ONE_RANK, export_on, settings=settings, config=config)
    assert stored_bytes(tmp_path / "out") == stored_bytes(sources[name])


def test_original_gpt2_files(sources: dict[str, Path], tmp_path: Path) -> None:
    """They lack the "transformer." prefix, and contain masks besides the weights."""
    shutil.copytree(sources["gpt2"], tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()
    }
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 37, 37) for layer in range(2)}
    save_file(tensors | masks | {"lm_head.weight": tensors["wte.weight"].clone()}, path)
    run = tmp_path / "run"
    run_on(ONE_RANK, import_on, settings=Settings(source=str(path.parent), run=str(run)))
    settings = ExportSettings(run=str(run), output=str(tmp_path / "out"), check=False)
    config = read_config(run / "config.yaml")
    run_on(ONE_RANK, export_on, settings=settings, config=config)
    assert stored_bytes(tmp_path / "out") == stored_bytes(sources["gpt2"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "parameters, imported from `source` with Microtron and not trained further.\n" in card


def test_a_single_file_counts_before_several(sources: dict[str, Path], tmp_path: Path) -> None:
    """As in transformers; a folder may have both after a model was saved twice."""
    import transformers  # noqa: PLC0415  takes seconds

    folder, name = tmp_path / "source", "model.embed_tokens.weight"
    shutil.copytree(sources["llama"], folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    hf_model("Llama").half().save_pretrained(folder, max_shard_size="1GB")
    (folder / "model.safetensors.index.json").write_bytes(
        (sources["llama"] / "model.safetensors.index.json").read_bytes()
    )
    for path in sources["llama"].glob("*.safetensors"):
        shutil.copy(path, folder)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    ours = open_source(folder).read(name)
    assert ours.dtype == torch.float16
    assert torch.equal(ours.float(), theirs.get_parameter(name).float())


def import_and_measure(mesh: Mesh, one_layer: Settings, settings: Settings) -> None:
    import_model(one_layer, mesh)  # once first, because libraries keep some memory
    before = forget_peak_memory()
    import_model(settings, mesh)
    assert peak_memory() - before < 8 * 2**20, (peak_memory() - before) / 2**20


def test_memory_is_that_of_one_tensor(sources: dict[str, Path], tmp_path: Path) -> None:
    """A model of 76 MiB with tensors of at most 1 MiB needs less than 8 MiB.

    The moments, all zeros, take no disk space.
    """
    settings = {}
    for layers in (1, 20):
        model = hf_model("Llama", num_hidden_layers=layers, hidden_size=256, intermediate_size=1024)
        model.save_pretrained(tmp_path / f"source{layers}")
        settings[layers] = Settings(
            source=str(tmp_path / f"source{layers}"),
            run=str(tmp_path / f"run{layers}"),
            tokenizer=str(sources["llama"] / "tokenizer.model"),
        )
    run_on(ONE_RANK, import_and_measure, one_layer=settings[1], settings=settings[20])
    size = (tmp_path / "source20/model.safetensors").stat().st_size
    assert size > 70 * 2**20
    file = (tmp_path / "run20/checkpoints/step_00000000/rank_00000.safetensors").stat()
    assert file.st_size > 2.9 * size
    assert 512 * file.st_blocks < 1.1 * size


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_train_resumes(name: str, sources: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """At TP=2, with new data, seed and batch size."""
    run = tmp_path / "mine"
    run_on(ONE_RANK, import_on, settings=Settings(source=str(sources[name]), run=str(run)))
    arguments = [
        f"config={run}/config.yaml",
        "data.source=text",
        f"data.path={corpus}",
        f"data.cache_directory={tmp_path / 'cache'}",
        "run.seed=7",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.precision=fp32",
        "train.compile=false",
        "evaluate.interval=0",
        "logging.wandb=disabled",
    ]
    train_on(Layout(tp=2), [*arguments, "train.train_steps=0"])
    train_on(Layout(tp=2), [*arguments, "train.train_steps=2"])
    assert [row["step"] for row in rows(tmp_path, "mine")] == [1, 2]
    # These large random weights are worse than a new model, which starts near ln 603 = 6.4.
    assert rows(tmp_path, "mine")[0]["train/loss"] > 10
    # A moved run continues too: the tokenizer is compared by its content.
    run.rename(tmp_path / "moved")
    moved = [argument.replace(str(run), str(tmp_path / "moved")) for argument in arguments]
    moved += ["run.name=moved", f"data.tokenizer={tmp_path}/moved/tokenizer.model"]
    moved += ["parallel.tensor_model_parallel_size=1"]
    train_on(ONE_RANK, [*moved, "train.train_steps=3"])
    assert [row["step"] for row in rows(tmp_path, "moved")] == [1, 2, 3]


def test_the_model_cannot_change(sources: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Only settings that have had no effect yet can be chosen at the first start."""
    run = tmp_path / "mine"
    run_on(ONE_RANK, import_on, settings=Settings(source=str(sources["llama"]), run=str(run)))
    arguments = [
        f"config={run}/config.yaml",
        "data.source=text",
        f"data.path={corpus}",
        f"data.cache_directory={tmp_path / 'cache'}",
        "model.rotary_base=5",
        "train.train_steps=0",
    ]
    run_on(ONE_RANK, refuse_to_train, config=parse_config(arguments))


def refuse_to_train(mesh: Mesh, config: Config) -> None:
    message = r"model\.rotary_base=5\.0 \(was 10000\.0\); change it back"
    with pytest.raises(UserError, match=message), RunFolder(config, mesh) as folder:
        train(config, mesh, folder, StopSignals())


def test_settings_are_derived(sources: dict[str, Path], tmp_path: Path) -> None:
    """From config.json of either family; a Llama may get shorter rows."""
    for name, expected in {
        "llama, tied, bf16": {
            "seq_length": 16,
            "num_query_groups": 2,
            "norm_epsilon": 1e-6,
            "untie_embeddings_and_output_weights": False,
            "hidden_dropout": 0.0,
        },
        "gpt2": {
            "seq_length": 37,
            "activation": "gelu_tanh",
            "hidden_dropout": 0.1,
            "ffn_hidden_size": 128,
        },
    }.items():
        length = 16 if "llama" in name else None
        run = tmp_path / name.partition(",")[0]
        settings = Settings(source=str(sources[name]), run=str(run), seq_length=length)
        run_on(ONE_RANK, import_on, settings=settings)
        config = read_config(run / "config.yaml")
        assert {key: getattr(config.model, key) for key in expected} == expected
        assert config.data.vocab_size == VOCAB


def test_learned_positions_keep_their_length(sources: dict[str, Path], tmp_path: Path) -> None:
    """Only RoPE allows a shorter length."""
    settings = Settings(source=str(sources["gpt2"]), run=str(tmp_path / "run"), seq_length=16)
    message = "seq_length=16 differs from the 37 learned positions of the source"
    run_on(ONE_RANK, refuse, settings=settings, message=message)


def change_json(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def add_tensor(folder: Path, name: str, size: int) -> None:
    """Add a tensor to the only file."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(size)}, path)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another architecture": (
        lambda folder: change_json(folder, model_type="bert"),
        r"model_type=bert; expected gpt2 \(GPT2LMHeadModel\) or llama",
    ),
    "another head": (
        lambda folder: change_json(folder, architectures=["GPT2ForSequenceClassification"]),
        "GPT2ForSequenceClassification",
    ),
    "quantised": (
        lambda folder: change_json(folder, quantization_config={}),
        "quantization_config; use the unquantized weights",
    ),
    "an unsupported option": (
        lambda folder: change_json(folder, scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx=true, which is not supported; expected false",
    ),
    "two rates of dropout": (
        lambda folder: change_json(folder, embd_pdrop=0.5),
        r"embd_pdrop=0\.5.*expected 0\.1",
    ),
    "no size": (
        lambda folder: change_json(folder, n_embd=None),
        "n_embd=null; expected a pos",
    ),
    "another size": (
        lambda folder: change_json(folder, n_positions=38),
        r"transformer\.wpe\.weight has shape \[37, 32\]; its config\.json implies \[38, 32\]",
    ),
    "another vocabulary": (
        lambda folder: change_json(folder, vocab_size=300),
        "320 tokens but the model has only 300 embeddings",
    ),
    "no config": (lambda folder: remove(folder, "config.json"), "has no config.json"),
    "no tokenizer": (
        lambda folder: remove(folder, "tokenizer.model"),
        "tokenizer=.* is a folder without tokenizer.model and tokenizer.json",
    ),
    "tiktoken": (
        lambda folder: (folder / "tokenizer.model").write_text("IQ== 0\n"),
        "not a readable sentencepiece model",
    ),
    "no weights": (lambda folder: remove(folder, "*.safetensors"), r"has no model\.safetensors"),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"12345678{"),
        "cannot be read",
    ),
    "an unknown tensor": (
        lambda folder: add_tensor(folder, "transformer.h.0.adapter.weight", 3),
        r"has transformer\.h\.0\.adapter\.weight, which this model does not have",
    ),
    "a file elsewhere": (
        lambda folder: (
            (folder / "model.safetensors")
            .rename(folder / "model.safetensors.index.json")
            .write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
        ),
        "names '../../secret.safetensors', which is not a file beside it",
    ),
}


def refuse(mesh: Mesh, settings: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(settings, mesh)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_sources_are_refused(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """The error names the file and the key; no folder remains."""
    change, message = REFUSED[name]
    shutil.copytree(sources["gpt2"], tmp_path / "source")
    change(tmp_path / "source")
    settings = Settings(source=str(tmp_path / "source"), run=str(tmp_path / "run"))
    run_on(ONE_RANK, refuse, settings=settings, message=message)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Changes to a config.json that transformers 5.23 saves. If it accepts them, its logits change.
REFUSED_OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama3 beside default": (
        "Llama",
        {"rope_scaling": _LLAMA3, "rope_parameters": _DEFAULT_ROPE},
        r'rope_scaling\.rope_type="llama3", rope_parameters\.rope_type="default"; keep only',
    ),
    "two scalings": (
        "Llama",
        {"rope_scaling": _LLAMA3, "rope_parameters": {**_LLAMA3, "factor": 32.0}},
        r"rope_scaling\.factor=8\.0, rope_parameters\.factor=32\.0; keep only the one",
    ),
    "a length outside the scaling": (
        "Llama",
        {"rope_parameters": _LLAMA3, "original_max_position_embeddings": 32},
        "original_max_position_embeddings=16, original_max_position_embeddings=32; keep only",
    ),
    "a scaling without a factor": (
        "Llama",
        {"rope_parameters": {"rope_type": "llama3"}},
        r"rope_parameters\.factor=null; expected a number",
    ),
    "yarn": (
        "Qwen3",
        {"rope_parameters": {"factor": 4.0, "rope_type": "yarn"}},
        r'rope_parameters\.rope_type="yarn", which is not supported; expected type default',
    ),
    "two types": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "type": "linear"}},
        r'rope_parameters\.type="linear"',
    ),
    "old name of the type": ("Llama", {"rope_scaling": {"type": "linear"}}, r'type="linear"'),
    "scaled by its factor": (
        "Llama",
        {"rope_parameters": {**_DEFAULT_ROPE, "factor": 2.0}},
        r"rope_parameters\.factor=2\.0",
    ),
    "a rope for each kind of layer": (
        "Llama",
        {"rope_parameters": {"full_attention": _DEFAULT_ROPE}},
        r"rope_parameters\.full_attention=",
    ),
    "no rope type": ("Llama", {"rope_parameters": {"rope_type": None}}, r"rope_type=null"),
    "a list": ("Llama", {"rope_parameters": [1]}, r"rope_parameters=\[1\]"),
    "no base": (
        "Llama",
        {"rope_parameters": None, "rope_theta": None},
        r"rope_theta=null; expected a number",
    ),
    "a string as base": ("Llama", {"rope_theta": "1e4"}, r'rope_theta="1e4"; expected a number'),
    "two bases": (
        "Llama",
        {"rope_theta": 500.0, "rope_parameters": _DEFAULT_ROPE},
        r"rope_parameters\.rope_theta=10000\.0, rope_theta=500\.0; keep only the one",
    ),
    "a base that version 5 does not read": (
        "Llama",
        {
            "rope_scaling": {"rope_type": "default"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        r"rope_scaling\.rope_theta=10000\.0, rope_parameters\.rope_theta=500\.0",
    ),
    "partial rotary": (
        "Llama",
        {"rope_parameters": None, "partial_rotary_factor": 0.5},
        r"partial_rotary_factor=0\.5, which is not supported; expected 1\.0",
    ),
    "partial rotary inside": (
        "Qwen3",
        {"rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor=0\.5",
    ),
    "two fractions": (
        "StableLm",
        {"partial_rotary_factor": 0.5},
        r"rope_parameters\.partial_rotary_factor=0\.25, partial_rotary_factor=0\.5; keep only",
    ),
    "not causal": ("Llama", {"is_causal": False}, "is_causal=false"),
    "not causal, GPT-2": ("GPT2", {"is_causal": False}, "is_causal=false"),
    "a window": ("Llama", {"sliding_window": 4}, "sliding_window=4"),
    "a window that is used": (
        "Qwen2",
        {"sliding_window": 4, "use_sliding_window": True},
        "use_sliding_window=true, which is not supported",
    ),
    "windows of some layers": (
        "Qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        r'layer_types=\["full_attention", "sliding_attention"\]',
    ),
    "layer types that are no list": ("Qwen3", {"layer_types": 1}, "layer_types=1"),
    "biases of attention": ("Qwen3", {"attention_bias": True}, "attention_bias=true"),
    "a norm for each head": ("StableLm", {"qk_layernorm": True}, "qk_layernorm=true"),
    "parallel residuals": (
        "StableLm",
        {"use_parallel_residual": True},
        "use_parallel_residual=true",
    ),
    "dropout at other places": ("StableLm", {"hidden_dropout": 0.1}, r"hidden_dropout=0\.1"),
    "layers that differ": (
        "Llama",
        {"per_layer_config": {"0": {"hidden_act": "gelu"}}},
        "per_layer_config=",
    ),
    "another activation": ("Llama", {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    "biases of one kind": ("Llama", {"attention_bias": True}, "attention_bias=true.*expected fal"),
    "no head dimension": ("Qwen3", {"head_dim": None}, "head_dim=null; expected a positive"),
    "a string for a bool": (
        "Llama",
        {"tie_word_embeddings": "false"},
        'tie_word_embeddings="false"; expected true or false',
    ),
    "a string for a number": (
        "Llama",
        {"rms_norm_eps": "1e-5"},
        "rms_norm_eps=.*a number",
    ),
    "null for a number": ("Llama", {"attention_dropout": None}, "attention_dropout=null"),
    "no groups": ("Llama", {"num_key_value_heads": 0}, "num_key_value_heads=0.*positive"),
    "an alias that differs": (
        "GPT2",
        {"num_attention_heads": 2},
        "num_attention_heads=2.*expected 4",
    ),
    "a bool for a size": ("GPT2", {"n_layer": True}, "n_layer=true"),
    "no inner size": ("GPT2", {"n_inner": 0}, "n_inner=0"),
    "a list of activations": ("GPT2", {"activation_function": ["gelu"]}, "activation_function="),
}


def options_of(kind: str, **changes: Any) -> dict[str, Any]:
    """The content of a config.json."""
    import transformers  # noqa: PLC0415  takes seconds

    return getattr(transformers, f"{kind}Config")(**_BASE[kind]).to_dict() | changes


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_that_change_the_function_are_refused(name: str) -> None:
    kind, changes, message = REFUSED_OPTIONS[name]
    with pytest.raises(UserError, match=message):
        from_huggingface_config(options_of(kind, **changes))


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({}, 10000.0),
        ({"rope_parameters": None}, 10000.0),
        ({"rope_parameters": None, "rope_theta": 500}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0),
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": None}, 500.0),
        ({"rope_parameters": {"type": "default"}, "rope_theta": 500.0}, 500.0),
        ({"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 500}, 500.0),
        ({"rope_scaling": {"rope_theta": 10000.0, "partial_rotary_factor": 1}}, 10000.0),
    ],
)
def test_the_rotary_base(changes: dict[str, Any], base: float) -> None:
    """Wherever a version of transformers stores it."""
    _, _, options = from_huggingface_config(options_of("Llama", **changes))
    assert options["rotary_base"] == base


_SCALED = {
    "rope_scaling_type": "llama3",
    "rope_scaling_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position": 16,
}
_WITHOUT_LENGTH = {k: v for k, v in _LLAMA3.items() if k != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("Llama", {"rope_parameters": _LLAMA3}, _SCALED),
        ("Llama", {"rope_parameters": None, "rope_scaling": _LLAMA3, "rope_theta": 5e5}, _SCALED),
        ("Llama", {"rope_scaling": _LLAMA3, "rope_parameters": _LLAMA3}, _SCALED),
        (
            "Llama",
            {"rope_parameters": {**_WITHOUT_LENGTH, "type": "llama3"}},
            {**_SCALED, "rope_original_max_position": 64},
        ),
        ("Llama", {"original_max_position_embeddings": 16}, {"rope_scaling_type": None}),
        ("Llama", {"head_dim": 8}, {"kv_channels": None, "add_qkv_bias": False}),
        ("Llama", {"head_dim": 16}, {"kv_channels": 16}),
        ("Qwen2", {"sliding_window": 4}, {"add_qkv_bias": True, "add_bias_linear": False}),
        ("Qwen3", {}, {"kv_channels": 24, "qk_layernorm": True, "add_qkv_bias": False}),
        ("StableLm", {}, {"rotary_percent": 0.25, "normalization": "LayerNorm"}),
        ("StableLm", {"rope_parameters": None}, {"rotary_percent": 0.25, "rotary_base": 10000.0}),
        (
            "StableLm",
            {"rope_parameters": None, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
            {"rotary_percent": 0.5, "add_qkv_bias": True, "kv_channels": None},
        ),
    ],
)
def test_options_of_published_models(
    kind: str, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Each becomes the settings of the same function, and these become equal options again."""
    family, vocab_size, found = from_huggingface_config(options_of(kind, **changes))
    settings = dataclasses.asdict(ModelConfig(**found))
    assert {key: settings[key] for key in expected} == expected
    written = to_huggingface_config(ModelConfig(**found), vocab_size)
    assert from_huggingface_config(json.loads(json.dumps(written))) == (family, VOCAB, found)
    assert unknown_options(written) == {}


# What version 4 of transformers has written for models on the hub.
_PUBLISHED = {
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1,
    "initializer_range": 0.02, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    "num_key_value_heads": 8, "use_cache": True, "transformers_version": "4.51.0",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_0.6b": _PUBLISHED | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "head_dim": 128, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None,
        "use_sliding_window": False, "max_window_layers": 28,
        "bos_token_id": 151643, "eos_token_id": 151645,
    },
    "llama3.2_1b": _PUBLISHED | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "mlp_bias": False,
        "rope_scaling": _LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configurations_are_those_of_published_models(name: str) -> None:
    """Except for the length of a row."""
    shipped = parse_config([f"config={name}"])
    _, vocab_size, settings = from_huggingface_config(PUBLISHED[name])
    assert unknown_options(PUBLISHED[name]) == {}
    assert vocab_size == shipped.data.vocab_size
    length = shipped.model.seq_length
    assert ModelConfig(**{**settings, "seq_length": length}) == shipped.model


@pytest.mark.parametrize("kind", _BASE)
def test_every_option_of_transformers_is_known(kind: str) -> None:
    """A release with a new option fails here; options that no release has are reported."""
    import transformers  # noqa: PLC0415

    fields = dataclasses.fields(getattr(transformers, f"{kind}Config"))
    options = options_of(kind) | {field.name: "something" for field in fields}
    assert len(fields) > 20
    assert unknown_options(options | {"model_type": kind.lower(), "architectures": None}) == {}
    options = options_of(kind, rope_interleaved=True, kv_sharing_modes=None)
    assert unknown_options(options) == {"rope_interleaved": True}


def test_a_tied_model_with_a_separate_head(sources: dict[str, Path], tmp_path: Path) -> None:
    """A head that differs, which transformers 5 would use, is refused; an equal one is accepted."""
    for number, (name, source) in enumerate(
        {"lm_head.weight": "gpt2", "model.embed_tokens.weight": "llama, tied, bf16"}.items()
    ):
        folder = tmp_path / f"source{number}"
        shutil.copytree(sources[source], folder)
        remove(folder, "*.index.json")
        tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(path)
        remove(folder, "*.safetensors")
        embedding = tensors["transformer.wte.weight" if source == "gpt2" else name]
        tensors["lm_head.weight"] = embedding.clone()
        save_file(tensors, folder / "model.safetensors")
        settings = Settings(source=str(folder), run=str(tmp_path / f"equal{number}"))
        run_on(ONE_RANK, import_on, settings=settings)
        tensors["lm_head.weight"][0, 0] += 1
        save_file(tensors, folder / "model.safetensors")
        settings = Settings(source=str(folder), run=str(tmp_path / f"different{number}"))
        message = r"tie_word_embeddings=true, but lm_head\.weight differs from the embedding"
        run_on(ONE_RANK, refuse, settings=settings, message=message)


@pytest.mark.parametrize(
    ("ids", "warning"),
    [
        ({"eos_token_id": [2]}, ""),
        ({"eos_token_id": None, "bos_token_id": None}, ""),
        (
            {"eos_token_id": [2, 7]},
            "eos_token_id=[2, 7], but the tokenizer ends texts with 2: on",
        ),
        ({"eos_token_id": [7]}, "eos_token_id=[7], but the tokenizer ends texts with 2: is it"),
        ({"eos_token_id": 7}, "eos_token_id=7, but the tokenizer ends texts with 2: is it the mo"),
        ({"bos_token_id": 7}, "bos_token_id=7, but the tokenizer begins texts with 1: is it the"),
    ],
)
def test_token_ids_that_differ_from_the_tokenizer(
    ids: dict[str, Any],
    warning: str,
    sources: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are reported; training uses those of the tokenizer."""
    shutil.copytree(sources["gpt2"], tmp_path / "source")
    change_json(tmp_path / "source", **ids)
    settings = Settings(source=str(tmp_path / "source"), run="unused")
    with caplog.at_level(logging.WARNING, "microtron"):
        find_tokenizer(settings, open_source(tmp_path / "source"), VOCAB)
    assert warning in caplog.text
    assert bool(warning) == bool(caplog.text)


def test_a_model_on_the_hub(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the cache, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--somebody--gpt"
    for revision in ("a" * 40, "b" * 40):
        shutil.copytree(sources["gpt2"], cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("a" * 40)
    (cached / "refs/v1").write_text("b" * 40)
    assert download("somebody/gpt", None).name == "a" * 40
    assert download("somebody/gpt", "v1").name == "b" * 40
