"""Random models of each family: imported, scored, trained and exported, as published ones would be.

Their shapes are unusual: an odd vocabulary, heads that are not hidden_size / num_attention_heads,
and few query groups.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from checkpoints import held_checkpoint
from configs import Config, read_config
from configs.program_settings import run_config
from data import load_tokenizer
from export import Settings as ExportSettings
from export import export
from import_hf import Settings, import_model
from interop.check import Comparison, checkpoint_logits, unusual_texts
from interop.huggingface_config import ARCHITECTURES, from_huggingface_config
from parallel import Mesh
from tests.data_corpora import LLAMA3_WORDS, small_tokenizer, write_json_tokenizer
from tests.distributed import ONE_RANK, Layout, run_on
from tests.interop.test_import_hf import stored_bytes
from tests.runs import rows, train_on
from training.optimizer import WEIGHTS

VOCAB, LENGTH, STEPS = 407, 41, 10  # embeddings, of which the tokenizers use 320 or 400
_WIDE = {"hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
_NARROW = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 40}


@dataclass(frozen=True)
class Published:
    """A family, the options of a model, and the kind of tokenizer that it has."""

    family: str
    tokenizer: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


MODELS = {
    "GPT-2": Published(
        "gpt2", "gpt2", {"n_embd": 20, "n_layer": 2, "n_head": 2, "n_inner": 52, "n_positions": 41}
    ),
    "Llama 2": Published("llama", "sentencepiece", _NARROW),
    "Llama 3.1": Published(
        "llama", "llama3", _NARROW | {"head_dim": 10, "rope_parameters": _LLAMA3}
    ),
    "Llama 3.2": Published(
        "llama",
        "llama3",
        _NARROW | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3},
        torch.bfloat16,
    ),
    "SmolLM2": Published("llama", "gpt2", _NARROW | {"tie_word_embeddings": True}),
    "Qwen2": Published("qwen2", "qwen", _WIDE, torch.bfloat16),
    "Qwen2.5": Published("qwen2", "qwen", _NARROW | {"tie_word_embeddings": True}),
    "Qwen3": Published("qwen3", "qwen", _WIDE),
    "StableLM 2": Published("stablelm", "gpt2", _NARROW | {"use_qkv_bias": True}),
}
QUICK = ("GPT-2", "Llama 3.1", "Qwen2", "Qwen3")


def save(model: Published, folder: Path) -> Any:
    """Save a random model and its tokenizer as they would be published; return the model."""
    import transformers  # noqa: PLC0415  takes seconds

    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    if model.family != "gpt2":
        common |= {"num_hidden_layers": 2, "intermediate_size": 52, "max_position_embeddings": 41}
    else:
        common |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.AutoConfig.for_model(model.family, **common, **model.options)
    torch.manual_seed(1)
    theirs = getattr(transformers, ARCHITECTURES[model.family])(config).to(model.dtype)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # norms and biases are ones and zeros
                parameter.add_(0.2 * torch.randn(parameter.shape))
    theirs.save_pretrained(folder)
    if model.tokenizer == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(small_tokenizer().content)
    elif model.tokenizer == "qwen":
        write_qwen_tokenizer(folder)
    else:
        write_json_tokenizer(folder, model.tokenizer)
    # In float32, but with frequencies that were never rounded to bfloat16.
    return type(theirs).from_pretrained(folder, dtype=torch.float32).eval()


def write_qwen_tokenizer(folder: Path) -> None:
    """Qwen's expression and normalizer, tokens for chats after the others, and no bos."""
    path = write_json_tokenizer(folder, "llama3")
    spec = json.loads(path.read_text())
    split = spec["pre_tokenizer"]["pretokenizers"][0]
    assert split["pattern"]["Regex"] == LLAMA3_WORDS
    split["pattern"]["Regex"] = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
    spec |= {"normalizer": {"type": "NFC"}, "post_processor": None}
    old, names = spec["added_tokens"][0], ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    spec["added_tokens"] = [
        old | {"id": 400 + number, "content": name} for number, name in enumerate(names)
    ]
    path.write_text(json.dumps(spec, ensure_ascii=False))
    beside = {"bos_token": None, "eos_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 400}))


def import_on(mesh: Mesh, settings: Settings) -> None:
    import_model(settings, mesh)


def export_on(mesh: Mesh, settings: ExportSettings, config: Config, exact: bool) -> None:
    comparison = export(settings, config, mesh)
    assert isinstance(comparison, Comparison)
    assert comparison.num_text_differences == 0
    assert not exact or comparison.max_difference < 1e-5 * comparison.max_logit


def score_on(mesh: Mesh, run: Path, expected: Path) -> None:
    """Compare logits and the loss of a checkpoint with those of transformers."""
    tokens, logits = (load_file(expected)[name] for name in ("tokens", "logits"))
    config = run_config(str(run), precision="fp32")
    with held_checkpoint(run / "checkpoints", mesh, None, prefix=WEIGHTS) as checkpoint:
        assert checkpoint is not None
        ours = checkpoint_logits(config, checkpoint, tokens, mesh)
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()
    losses = [F.cross_entropy(x[:, :-1].mT, tokens[:, 1:]).item() for x in (ours, logits)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_a_published_model(name: str, corpus: Path, tmp_path: Path) -> None:
    """Ours scores like transformers, trains alike on three layouts, and goes out unchanged."""
    model, source, run = MODELS[name], tmp_path / "source", tmp_path / "run"
    theirs = save(model, source)
    run_on(ONE_RANK, import_on, settings=Settings(source=str(source), run=str(run)))

    tokens = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(tokens).logits
    save_file({"tokens": tokens, "logits": logits}, tmp_path / "expected")
    for layout in (ONE_RANK, Layout(tp=2)):
        run_on(layout, score_on, run=run, expected=tmp_path / "expected")

    curves = []
    for number, layout in enumerate((ONE_RANK, Layout(tp=2), Layout(dp=2))):
        copy = tmp_path / f"trained{number}"
        shutil.copytree(run, copy)
        train_on(layout, training_arguments(copy, corpus))
        curves.append([row["train/loss"] for row in rows(tmp_path, copy.name)])
    assert len(curves[0]) == STEPS
    assert curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)

    given = {"run": str(run), "output": str(tmp_path / "out")}
    settings = ExportSettings(**given, dtype=str(model.dtype).removeprefix("torch."))  # type: ignore[arg-type]
    config, is_exact = run_config(str(run), precision="fp32"), model.dtype == torch.float32
    run_on(ONE_RANK, export_on, settings=settings, config=config, exact=is_exact)
    assert stored_bytes(tmp_path / "out") == stored_bytes(source)
    options = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "out")
    ]
    assert from_huggingface_config(options[0]) == from_huggingface_config(options[1])
    require_equal_ids(source, tmp_path / "out")


def training_arguments(run: Path, corpus: Path) -> list[str]:
    tokenizer = read_config(run / "config.yaml").data.tokenizer
    assert tokenizer is not None
    return [
        f"config={run}/config.yaml",
        f"run.name={run.name}",
        f"run.directory={run.parent}",
        f"data.tokenizer={run / Path(tokenizer).name}",
        "data.source=text",
        f"data.path={corpus}",
        f"data.cache_directory={run.parent / 'cache'}",
        f"train.train_steps={STEPS}",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.precision=fp32",
        "train.compile=false",
        "optimizer.lr=1e-3",
        "optimizer.lr_warmup_steps=2",
        "evaluate.interval=0",
        "logging.wandb=disabled",
    ]


def require_equal_ids(source: Path, exported: Path) -> None:
    """On 2,000 unusual texts, ours and the exported tokenizer's in transformers."""
    import transformers  # noqa: PLC0415  takes seconds

    ours = load_tokenizer(source)
    auto = transformers.AutoTokenizer.from_pretrained(exported)
    texts = unusual_texts(ours, 2000)
    assert auto(texts, add_special_tokens=False)["input_ids"] == [
        ids.tolist() for ids in ours.encode_batch(texts)
    ]
