"""Exported models have the logits and token ids of the run, from any layout."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from checkpoints.full_tensors import TensorInfo
from checkpoints.manifest import read_manifest
from configs import Config, ConfigError, ModelConfig
from export import Settings, export, require_equal, split, write_weights
from interop.atomic_directory import atomic_directory
from interop.check import compare, random_tokens, unusual_texts
from interop.huggingface_config import family_of
from model import Sampling, generate
from parallel import Mesh
from tests.data.test_tokenizer import ODD_TEXTS, random_strings
from tests.data_corpora import small_tokenizer
from tests.distributed import ONE_RANK, Layout, run_on
from tests.memory import forget_peak_memory, peak_memory
from tests.random_runs import GPT2, LLAMA, STEP, VOCAB, weight, write_run
from tests.reference import reference_logits
from training.inference import load_for_inference

CASES = {
    "llama": LLAMA,
    "llama, tied, biases, 1 group": dataclasses.replace(
        LLAMA,
        num_query_groups=1,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
    ),
    "gpt2": GPT2,
    "gpt2, untied, exact gelu": dataclasses.replace(
        GPT2, activation="gelu", untie_embeddings_and_output_weights=True
    ),
}


def export_on(mesh: Mesh, settings: Settings, config: Config) -> None:
    export(settings, config, mesh)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Path]]:
    """Each case, saved at TP=2 x DP=2 and exported on one rank."""
    folders = {}
    for name, model in CASES.items():
        folder = tmp_path_factory.mktemp("case")
        config = write_run(folder / "run", model, Layout(tp=2, dp=2))
        settings = Settings(run=str(folder / "run"), output=str(folder / "out"), check=False)
        run_on(ONE_RANK, export_on, settings=settings, config=config)
        folders[name] = config, folder / "out"
    return folders


def full_weights(config: Config, folder: Path) -> dict[str, Tensor]:
    """The weights of the run, by our names."""
    tensors = read_manifest(folder.parent / f"run/checkpoints/step_{STEP:08d}").tensors
    names = {name.removeprefix("parameters."): entry["shape"] for name, entry in tensors.items()}
    return {name: weight(name, shape) for name, shape in names.items() if "exp_avg" not in name}


def load(folder: Path) -> tuple[Any, Any]:
    """Load the model and the tokenizer with transformers."""
    import transformers  # noqa: PLC0415  takes seconds

    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_the_dense_reference(
    name: str, exported: dict[str, tuple[Config, Path]]
) -> None:
    """In float32 within 1e-5; config.json names the class."""
    config, folder = exported[name]
    model, _ = load(folder)
    assert (
        type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    tokens = random_tokens(config, VOCAB)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    weights = {key: value.double() for key, value in full_weights(config, folder).items()}
    expected = reference_logits(weights, config.model, tokens, positions)
    torch.testing.assert_close(model(tokens).logits.double(), expected, rtol=0, atol=1e-5)
    assert model.dtype == torch.float32


def write_greedy(mesh: Mesh, config: Config, run: Path, prompt: list[int], path: Path) -> None:
    """Write the tokens that generate.py would choose."""
    trained = load_for_inference(config, run, mesh, None)
    tokenizer = trained.tokenizer
    tokens = generate(
        trained.model,
        prompt,
        config.model.seq_length - len(prompt),
        Sampling(temperature=0.0),
        num_ids=tokenizer.vocab_size,
        end_id=tokenizer.eos_id,
    )
    path.write_text(json.dumps(tokens))


@pytest.mark.parametrize("name", CASES)
def test_greedy_decoding_is_the_same(
    name: str, exported: dict[str, tuple[Config, Path]], tmp_path: Path
) -> None:
    """Compared with TP=2, up to the context length; unused vocabulary rows never win."""
    config, folder = exported[name]
    model, auto = load(folder)
    inputs = auto("def f(", return_tensors="pt")
    prompt = inputs["input_ids"][0].tolist()
    run_on(
        Layout(tp=2),
        write_greedy,
        config=config,
        run=folder.parent / "run",
        prompt=prompt,
        path=tmp_path / "tokens",
    )
    most = config.model.seq_length - len(prompt)
    theirs = model.generate(**inputs, max_new_tokens=most, do_sample=False)[0].tolist()
    assert json.loads((tmp_path / "tokens").read_text()) == theirs
    assert max(theirs) < auto.vocab_size < VOCAB


@pytest.mark.slow
def test_the_tokenizer_is_the_same(exported: dict[str, tuple[Config, Path]]) -> None:
    """Encoding and decoding agree on random texts, also with control pieces in them."""
    _, auto = load(exported["gpt2"][1])
    tokenizer = small_tokenizer()
    texts = [*ODD_TEXTS, *unusual_texts(tokenizer, 1000), *random_strings(1000, 60)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert auto(text)["input_ids"] == ids, text
        assert auto.decode(ids) == text
    assert (auto.bos_token_id, auto.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_the_other_files(exported: dict[str, tuple[Config, Path]]) -> None:
    """The card has the facts but no path; unused ids are never generated."""
    folder = exported["llama"][1]
    card = (folder / "README.md").read_text()
    for fact in ("7 steps", "12,345 tokens", "`my texts` (text)", "step 7: 3.5 nats", "0.75 bits"):
        assert fact in card
    assert "/home" not in card
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(320, VOCAB))
    assert (folder / "tokenizer.model").read_bytes() == small_tokenizer().content


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_and_precisions(
    dtype: str, exported: dict[str, tuple[Config, Path]], tmp_path: Path
) -> None:
    """Several files and an index hold the same tensors, rounded; transformers loads them."""
    config, folder = exported["gpt2"]
    settings = Settings(
        run=str(folder.parent / "run"),
        output=str(tmp_path / "out"),
        dtype=dtype,  # type: ignore[arg-type]
        max_shard_gib=20_000 / 2**30,
        check=False,
    )
    run_on(ONE_RANK, export_on, settings=settings, config=config)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 2
    with safe_open(folder / "model.safetensors", "pt") as whole:
        assert set(whole.keys()) == set(index["weight_map"])
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, "pt") as part:
                rounded = whole.get_tensor(name).to(getattr(torch, dtype))
                assert torch.equal(part.get_tensor(name), rounded)
    model, _ = load(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)


def test_tensors_are_split_over_files() -> None:
    """In order; a tensor larger than the limit gets its own file."""
    sizes = {"a": 3, "b": 2, "c": 9, "d": 1, "e": 4}
    infos = {name: TensorInfo(torch.float32, (size,)) for name, size in sizes.items()}
    assert [list(part) for part in split(infos, 4 * 5)] == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """A model of 76 MiB with tensors of at most 1 MiB needs less than 8 MiB."""
    model = dataclasses.replace(LLAMA, num_layers=20, hidden_size=256, ffn_hidden_size=1024)
    config = write_run(tmp_path / "run", model, ONE_RANK)
    checkpoint = read_manifest(tmp_path / f"run/checkpoints/step_{STEP:08d}")
    settings = Settings(run=str(tmp_path / "run"), output="")
    # Once with one layer first, because libraries keep some memory.
    few = {name: entry for name, entry in checkpoint.tensors.items() if "s.0." in name}
    write_weights(tmp_path, settings, config, dataclasses.replace(checkpoint, tensors=few))
    before = forget_peak_memory()
    write_weights(tmp_path, settings, config, checkpoint)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 60 * 2**20
    assert peak_memory() - before < 8 * 2**20


def test_differences_are_detected(exported: dict[str, tuple[Config, Path]]) -> None:
    """In one weight or one text; logits of rounded weights may differ."""
    config, folder = exported["llama"]
    tokens, (model, _) = random_tokens(config, VOCAB), load(folder)
    logits = model(tokens).logits.detach()
    same = compare(folder, logits, tokens, small_tokenizer())
    assert (same.max_difference, same.num_top1_differences, same.num_text_differences) == (0, 0, 0)
    require_equal(same, "float32")
    with torch.no_grad():
        model.model.norm.weight[3] += 0.01
    other = compare(folder, model(tokens).logits.detach(), tokens, small_tokenizer())
    with pytest.raises(ValueError, match=r"exported model differs in transformers.*logits"):
        require_equal(other, "float32")
    require_equal(other, "bfloat16")
    with pytest.raises(ValueError, match="tokenizer differs on 1 of 2000 texts"):
        require_equal(dataclasses.replace(same, num_text_differences=1), "bfloat16")


REFUSED = [
    (
        dataclasses.replace(LLAMA, qk_layernorm=True, add_qkv_bias=True),
        r"Qwen2.*model\.qk_layernorm=true \(needs",
    ),
    (
        dataclasses.replace(LLAMA, position_embedding_type="learned_absolute", activation="gelu"),
        r"Llama.*model\.activation=gelu \(needs swiglu\), model\.position_embedding_type=learned",
    ),
    (dataclasses.replace(LLAMA, rotary_percent=0.5), r"model\.rotary_percent=0\.5 \(needs 1\.0"),
    (dataclasses.replace(LLAMA, hidden_size=30, kv_channels=8), r"hidden_size=30 \(needs a mult"),
    (dataclasses.replace(GPT2, kv_channels=16), r"model\.kv_channels=16 \(needs null"),
    (dataclasses.replace(GPT2, num_query_groups=2), r"GPT2LMHead.*model\.num_query_groups=2"),
    (dataclasses.replace(GPT2, add_bias_linear=False), r"model\.add_bias_linear=false"),
]


@pytest.mark.parametrize(("model", "message"), REFUSED)
def test_unsupported_settings_are_named(model: ModelConfig, message: str) -> None:
    """With what the closest family needs."""
    with pytest.raises(ValueError, match=message):
        family_of(model)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A non-empty directory or a file is refused; an empty directory is fine."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("precious")
    with (
        pytest.raises(ConfigError, match=r"output=.*full already exists and is not empty"),
        atomic_directory(tmp_path / "full", "output"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="is a file or a link"),
        atomic_directory(tmp_path / "full/mine", "output"),
    ):
        pass
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty", "output") as work:
        (work / "new").write_text("")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_directory_is_complete_or_missing(tmp_path: Path) -> None:
    """An error leaves nothing; leftovers of a killed process are removed."""
    (tmp_path / ".out.partial/old").mkdir(parents=True)
    with atomic_directory(tmp_path / "out", "output") as work:
        assert list(work.iterdir()) == []
        with (
            pytest.raises(ConfigError, match="is being written by another process"),
            atomic_directory(tmp_path / "out", "output"),
        ):
            pass
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").rmdir()
    with (
        pytest.raises(OSError, match="disk"),
        atomic_directory(tmp_path / "out", "output") as work,
    ):
        fail_in(work)
    assert list(tmp_path.iterdir()) == []


def fail_in(work: Path) -> None:
    (work / "half").write_text("")
    raise OSError("the disk is full")
