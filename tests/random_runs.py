"""Run folders with random weights, written quickly by the pool of workers."""

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import begin_save, commit_save
from configs import Config, DataConfig, ModelConfig, RunConfig, TrainConfig, flatten, to_yaml
from model import build_model
from parallel import Mesh, local_shards
from tests.data_corpora import small_tokenizer
from tests.distributed import Layout, run_on
from training.optimizer import build_optimizer, training_tensors

VOCAB = 603  # the tokenizer has 320 of them; no multiple of a power of two
STEP, TOKENS = 7, 12_345
_SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 37}
LLAMA = ModelConfig(
    **_SHAPE,
    num_query_groups=2,
    ffn_hidden_size=80,
    normalization="RMSNorm",
    norm_epsilon=1e-6,
    activation="swiglu",
    position_embedding_type="rope",
    rotary_base=500.0,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
)
GPT2 = ModelConfig(**_SHAPE)


def run_of(model: ModelConfig, folder: Path) -> Config:
    """The configuration of a run in a folder."""
    return Config(
        run=RunConfig(name=folder.name, directory=str(folder.parent)),
        model=model,
        data=DataConfig(source="text", path="/home/somebody/my texts", vocab_size=VOCAB),
        train=TrainConfig(precision="fp32", compile=False),
    )


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A function of the name; no weight, norm or bias is zero or one."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    middle = 1.0 if name.endswith("norm.weight") else 0.0
    return middle + 0.2 * torch.randn(shape, generator=generator)


def write_run(folder: Path, model: ModelConfig, layout: Layout) -> Config:
    """Write a run folder with a checkpoint of this layout; return its configuration."""
    config = run_of(model, folder)
    run_on(layout, _write, folder=folder, config=config)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "tokenizer.model").write_bytes(small_tokenizer().content)
    rows = [
        {"step": step, "eval/loss": step / 2, "eval/perplexity": 1.5, "eval/bits_per_byte": 0.75}
        for step in (3, STEP, STEP + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return config


def _write(mesh: Mesh, folder: Path, config: Config) -> None:
    model = build_model(config, mesh)
    for name, shard in local_shards(model).items():
        shard.tensor.copy_(weight(name, shard.global_shape)[shard.slices])
    state = {
        "progress": {"step": STEP, "tokens": TOKENS, "wandb_id": "0", "consumed_samples": 0},
        "config": flatten(config),
        "data_fingerprint": "0",
        "tokenizer_fingerprint": small_tokenizer().fingerprint,
    }
    tensors = training_tensors(model, build_optimizer(model, config.optimizer))
    save = begin_save(folder / "checkpoints", STEP, tensors, state, mesh, background=False)
    commit_save(save, mesh)
