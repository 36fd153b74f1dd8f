"""Begin a run with a published model: `python import_hf.py source=DIR_OR_NAME run=runs/NAME`.

A GPT2LMHeadModel or LlamaForCausalLM becomes a run folder with a checkpoint at step 0, which
train.py takes up on any layout. No more than one tensor is in memory, or two to compare them.
"""

import dataclasses
import json
import logging
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
    load_settings,
    machine_errors_as_user_errors,
    read_config,
    to_yaml,
)
from interop.atomic_directory import new_folder, require_new


@dataclass(frozen=True)
class Settings:
    """Make a run of a model of Hugging Face, for train.py to go on with.

    Reads config.json, safetensors and tokenizer.model of a GPT2LMHeadModel or a LlamaForCausalLM;
    see docs/interop.md.
    """

    source: str  # a folder with a model, or the name of one on the hub
    run: str  # the folder of the new run, such as runs/mine
    revision: str | None = None  # of a model on the hub; null: the newest
    tokenizer: str | None = None  # a sentencepiece model file; null: the source's tokenizer.model
    seq_length: int | None = None  # positions in a row; null: as many as the model was made for
    RANGES: ClassVar = {"seq_length": Range(1)}


if __name__ == "__main__":
    # Before torch is imported, which takes seconds, so that a mistyped key is answered at once.
    SETTINGS = load_settings(Settings, sys.argv[1:])
    with exit_on_config_error():
        require_new(Path(SETTINGS.run).expanduser(), "run")

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints.full_tensors import TensorInfo, write_full_checkpoint
from data import Tokenizer, load_tokenizer
from interop.huggingface import Family, from_huggingface, to_huggingface
from interop.huggingface_config import ARCHITECTURES, from_huggingface_config, unknown_options
from interop.source import Source, download, open_source
from model import GPT
from parallel import Mesh, close_mesh, init_mesh
from tracking.console import set_up_logging
from training.optimizer import MOMENTS, WEIGHTS
from training.state import RunState

logger = logging.getLogger("microtron")

# A peak rate for weights that have learned something, and a warm-up for moments that have not.
_OPTIMIZER = OptimizerConfig(lr=1e-4, min_lr=1e-5, lr_warmup_steps=100)

_SHOWN = 60  # characters of a value in a warning


def import_model(settings: Settings, mesh: Mesh) -> Config:
    """Make the run folder on this rank; returns its configuration."""
    folder, run = Path(settings.source).expanduser(), Path(settings.run).expanduser()
    if not folder.is_dir():
        folder = download(settings.source, settings.revision)
    source = open_source(folder)
    family, vocab_size, options = from_huggingface_config(source.config)
    if unknown := unknown_options(source.config):
        logger.warning(
            "config.json sets %s, which %s of transformers does not have and which is not used; "
            "if the model was trained with other code that uses it, it computes something else",
            ", ".join(f"{key}={json.dumps(value)[:_SHOWN]}" for key, value in unknown.items()),
            ARCHITECTURES[family],
        )
    tokenizer = find_tokenizer(settings, source, vocab_size)
    with new_folder(run, "run") as work:
        (work / "tokenizer.model").write_bytes(tokenizer.model)
        config = Config(
            run=RunConfig(name=run.name, directory=str(run.parent)),
            model=ModelConfig(**options | seq_length_of(settings, options)),
            data=DataConfig(vocab_size=vocab_size, tokenizer=str(run / "tokenizer.model")),
            optimizer=_OPTIMIZER,
        )
        (work / "config.yaml").write_text(to_yaml(config), "utf-8")
        config = read_config(work / "config.yaml")  # checks types and ranges
        write_checkpoint(work / "checkpoints", config, source, family, tokenizer, mesh)
    return config


def seq_length_of(settings: Settings, options: dict[str, Any]) -> dict[str, int]:
    """What seq_length= changes, if it may."""
    length, table = settings.seq_length, options["seq_length"]
    if length is None:
        return {}
    if options["position_embedding_type"] == "learned_absolute" and length != table:
        raise ConfigError(
            f"seq_length={length} is not the length of the source's table of positions, {table}; "
            "leave it out",
            "seq_length",
        )
    return {"seq_length": length}


def find_tokenizer(settings: Settings, source: Source, vocab_size: int) -> Tokenizer:
    """The sentencepiece model that is given, or that of the source."""
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(Path(settings.tokenizer).expanduser(), "tokenizer")
    elif (source.folder / "tokenizer.model").is_file():
        tokenizer = load_tokenizer(source.folder / "tokenizer.model", "the source's tokenizer")
    else:
        raise UserError(
            f"{source.folder} has no tokenizer.model: its tokenizer is not one of sentencepiece, "
            "which ours are; if it has one elsewhere, give tokenizer=FILE"
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces and the model {vocab_size} rows of "
            "its vocabulary; give the model's own with tokenizer=FILE"
        )
    for name, verb, ours in (
        ("bos_token_id", "begins", tokenizer.bos_id),
        ("eos_token_id", "ends", tokenizer.eos_id),
    ):
        theirs = source.config.get(name)
        if theirs not in (None, ours, [ours]):
            hint = (
                "of these, training and generation use only the tokenizer's"
                if isinstance(theirs, list) and ours in theirs
                else "is it the model's own?"
            )
            logger.warning(
                "config.json has %s=%s, and the tokenizer %s texts with %d: %s",
                name,
                json.dumps(theirs),
                verb,
                ours,
                hint,
            )
    return tokenizer


def write_checkpoint(
    folder: Path, config: Config, source: Source, family: Family, tokenizer: Tokenizer, mesh: Mesh
) -> None:
    """The checkpoint of step 0: their weights in float32, moments of zeros, no text read yet."""
    model = GPT(config.model, config.data.vocab_size, mesh)  # takes no memory
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = to_huggingface(shapes, family, config.model)
    is_tied = not config.model.untie_embeddings_and_output_weights
    source.require(
        {
            name: tuple(make(lambda ours: torch.empty(shapes[ours], device="meta")).shape)
            for name, make in theirs.items()
        },
        ignored="lm_head.weight" if is_tied else None,
    )
    if is_tied and "lm_head.weight" in source.files:
        require_equal_head(source, family, config.model)
    infos = {
        f"{kind}{name}": TensorInfo(torch.float32, shape)
        for kind in (WEIGHTS, *(f"{moment}." for moment in MOMENTS))
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
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    write_full_checkpoint(folder, 0, state, infos, make)


def require_equal_head(source: Source, family: Family, config: ModelConfig) -> None:
    """Refuse a stored head that a tied model would drop; transformers 5 uses it."""
    embedding = from_huggingface("embedding.weight", family, config, source.read)
    head = source.read("lm_head.weight")
    if head.shape != embedding.shape or not (head == embedding).all():
        raise UserError(
            f"{source.folder}: config.json has tie_word_embeddings=true, but lm_head.weight "
            "differs from the embedding; set it to false to keep this head, or remove the tensor"
        )


@record
def main(settings: Settings) -> int:
    """Import on rank 0; any others, of torchrun, have nothing to do."""
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
            "imported %s; go on with\n  torchrun train.py config=%s/config.yaml data.source=...",
            settings.source,
            settings.run,
        )
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS))
