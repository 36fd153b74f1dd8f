"""Start a run from a Hugging Face model: `python import_hf.py source=DIR_OR_NAME run=runs/NAME`.

A GPT-2, Llama, Qwen2, Qwen3 or StableLM becomes a run folder with a checkpoint at step 0, which
train.py resumes on any layout. Holds one tensor in memory at a time, or two to compare them.
"""

import dataclasses
import json
import logging
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from configs import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Range,
    RunConfig,
    UserError,
    exit_on_config_error,
    exit_with_error,
    flatten,
    machine_errors_as_user_errors,
    read_config,
    to_yaml,
)
from configs.program_settings import load_settings
from interop.atomic_directory import atomic_directory, require_new


@dataclass(frozen=True)
class Settings:
    """Start a run from a Hugging Face model.

    Reads config.json, safetensors and tokenizer.model or tokenizer.json of a GPT-2, Llama, Qwen2,
    Qwen3 or StableLM; see docs/interop.md.
    """

    source: str  # the folder of a model, or its name on the hub
    run: str  # the folder of the new run, such as runs/mine
    revision: str | None = None  # of a model on the hub; null: the newest
    # sentencepiece model, tokenizer.json or a folder with one of them; null: that of the source
    tokenizer: str | None = None
    bos_token: str | None = None  # null: as the files next to tokenizer.json say
    eos_token: str | None = None  # null: as the files next to tokenizer.json say
    seq_length: int | None = None  # positions per row; null: the maximum of the source
    RANGES: ClassVar = {"seq_length": Range(1)}


if __name__ == "__main__":
    # Before the slow import of torch, so that invalid settings are reported at once.
    SETTINGS = load_settings(Settings, sys.argv[1:])
    with exit_on_config_error():
        require_new(Path(SETTINGS.run).expanduser(), "run")

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints.full_tensors import TensorInfo, write_full_checkpoint
from data import Tokenizer, load_tokenizer
from data.tokenizer import HuggingFaceTokenizer
from interop.huggingface import Family, from_huggingface, shapes_of, to_huggingface
from interop.huggingface_config import ARCHITECTURES, from_huggingface_config, unknown_options
from interop.source import Source, download, open_source
from model import GPT
from parallel import Mesh, close_mesh, init_mesh, local_shards
from tracking.console import set_up_logging
from training.optimizer import MOMENTS, WEIGHTS
from training.state import RunState

logger = logging.getLogger("microtron")

# A low peak rate because the weights are trained; warm-up because the moments are not.
_OPTIMIZER = OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_warmup_steps=100)
_MAX_SHOWN = 60  # characters of a value in a warning


def import_model(settings: Settings, mesh: Mesh) -> Config:
    """Write the run folder on this rank; returns its configuration."""
    folder, run = Path(settings.source).expanduser(), Path(settings.run).expanduser()
    source = open_source(
        folder if folder.is_dir() else download(settings.source, settings.revision)
    )
    family, vocab_size, model = from_huggingface_config(source.config)
    if unknown := unknown_options(source.config):
        logger.warning(
            "config.json sets %s, which %s of transformers does not have; ignored, but other code "
            "that uses these options computes another function",
            ", ".join(f"{key}={json.dumps(value)[:_MAX_SHOWN]}" for key, value in unknown.items()),
            ARCHITECTURES[family],
        )
    tokenizer = find_tokenizer(settings, source, vocab_size)
    if settings.seq_length is not None:
        if settings.seq_length != model["seq_length"] and family == "gpt2":
            raise ConfigError(
                f"seq_length={settings.seq_length} differs from the {model['seq_length']} learned "
                "positions of the source; leave it out",
                "seq_length",
            )
        model["seq_length"] = settings.seq_length
    with atomic_directory(run, "run") as work:
        (work / tokenizer.file_name).write_bytes(tokenizer.content)
        is_json = isinstance(tokenizer, HuggingFaceTokenizer)
        config = Config(
            run=RunConfig(name=run.name, directory=str(run.parent)),
            model=ModelConfig(**model),
            data=DataConfig(
                vocab_size=vocab_size,
                tokenizer=str(run / tokenizer.file_name),
                bos_token=tokenizer.bos_token if is_json else None,
                eos_token=tokenizer.eos_token if is_json else None,
            ),
            optimizer=_OPTIMIZER,
        )
        (work / "config.yaml").write_text(to_yaml(config), "utf-8")
        config = read_config(work / "config.yaml")  # checks types and ranges
        # Not the paths of this machine, since a model card names it.
        name = folder.resolve().name if folder.is_dir() else settings.source
        write_checkpoint(work / "checkpoints", config, source, family, tokenizer, name, mesh)
    return config


def find_tokenizer(settings: Settings, source: Source, vocab_size: int) -> Tokenizer:
    """Load the tokenizer given in the settings, otherwise that of the source."""
    path = Path(settings.tokenizer).expanduser() if settings.tokenizer else source.folder
    tokenizer = load_tokenizer(path, "tokenizer", settings.bos_token, settings.eos_token)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model has only {vocab_size} "
            "embeddings; give the tokenizer of the model with tokenizer=FILE"
        )
    for key, verb, token_id in (
        ("bos_token_id", "begins", tokenizer.bos_id),
        ("eos_token_id", "ends", tokenizer.eos_id),
    ):
        stored = source.config.get(key)
        if stored not in (None, token_id, [token_id]):
            is_one_of_several = isinstance(stored, list) and token_id in stored
            logger.warning(
                "config.json has %s=%s, but the tokenizer %s texts with %d: %s",
                key,
                json.dumps(stored),
                verb,
                token_id,
                "only that one is used" if is_one_of_several else "is it the model's tokenizer?",
            )
    return tokenizer


def write_checkpoint(
    folder: Path,
    config: Config,
    source: Source,
    family: Family,
    tokenizer: Tokenizer,
    name: str,
    mesh: Mesh,
) -> None:
    """Write the checkpoint of step 0: float32 weights, zero moments, nothing consumed."""
    model = GPT(config.model, config.data.padded_vocab_size, mesh)  # on the meta device
    shapes = {name: shard.global_shape for name, shard in local_shards(model).items()}
    makers = to_huggingface(shapes, family, config.model)
    is_tied = not config.model.untie_embeddings_and_output_weights
    ignored = "lm_head.weight" if is_tied else None
    source.require(shapes_of(makers, shapes), ignored=ignored)
    if is_tied and "lm_head.weight" in source.files:
        require_equal_head(source, family, config.model)
    infos = {
        f"{prefix}{name}": TensorInfo(torch.float32, shape)
        for prefix in (WEIGHTS, *(f"{moment}." for moment in MOMENTS))
        for name, shape in shapes.items()
    }

    def make(name: str) -> Tensor | None:
        if not name.startswith(WEIGHTS):
            return None
        return from_huggingface(name.removeprefix(WEIGHTS), family, config.model, source.read)

    state = {
        "progress": dataclasses.asdict(RunState(wandb_id=uuid.uuid4().hex[:12])),
        "config": flatten(config),
        "data_fingerprint": None,
        "imported_from": name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    write_full_checkpoint(folder, 0, state, infos, make)


def require_equal_head(source: Source, family: Family, config: ModelConfig) -> None:
    """Raise UserError if a tied model has a separate head, which transformers 5 would use."""
    embedding = from_huggingface("embedding.weight", family, config, source.read)
    head = source.read("lm_head.weight")
    if head.shape != embedding.shape or not (head == embedding).all():
        raise UserError(
            f"{source.folder}: config.json has tie_word_embeddings=true, but lm_head.weight "
            "differs from the embedding; set it to false to keep this head, or remove the tensor"
        )


@record
def main(settings: Settings) -> int:
    """Import on rank 0; other ranks have nothing to do."""
    mesh = init_mesh(1, sequence_parallel=False)
    set_up_logging(mesh.world.rank)
    if mesh.world.rank == 0:
        try:
            with machine_errors_as_user_errors(f"import {settings.source}"):
                config = import_model(settings, mesh)
        except UserError as error:
            exit_with_error(str(error))
        sys.stdout.write(to_yaml(config))
        logger.info(
            "imported %s; train it with\n  torchrun train.py config=%s/config.yaml data.source=...",
            settings.source,
            settings.run,
        )
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
