"""Load the model of a run for inference: the weights of any checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from checkpoints import Checkpoint, held_checkpoint, load_tensors, require_fingerprint
from configs import Config, UserError
from data import Tokenizer, load_tokenizer
from model import GPT, build_inference_model
from parallel import Mesh
from training.hardware import choose_precision
from training.optimizer import WEIGHTS, weight_tensors


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its run's configuration and tokenizer."""

    config: Config
    mesh: Mesh
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    model: GPT


def load_for_inference(config: Config, folder: Path, mesh: Mesh, step: int | None) -> LoadedModel:
    """Load the newest checkpoint of a run folder, or that of a step; all ranks call this.

    Raises UserError if there is no intact checkpoint or another tokenizer.
    """
    with held_checkpoint(folder / "checkpoints", mesh, step, prefix=WEIGHTS) as checkpoint:
        if checkpoint is None:
            raise UserError(
                f"run={folder} has no checkpoint yet in {folder / 'checkpoints'}; "
                "train.py saves every checkpoint.save_interval steps and at the end"
            )
        tokenizer = load_run_tokenizer(folder, config)
        require_fingerprint(checkpoint, "tokenizer", tokenizer.fingerprint)
        choose_precision(config, mesh, checkpoint)
        model = build_inference_model(config, mesh)
        load_tensors(checkpoint, weight_tensors(model), prefix=WEIGHTS, converts=True)
    return LoadedModel(config, mesh, checkpoint, tokenizer, model)


def load_run_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """Load the tokenizer in a run folder; the configuration of the run names its bos and eos."""
    data = config.data
    return load_tokenizer(folder, "the tokenizer of the run", data.bos_token, data.eos_token)
