"""Write a model of ours as one of Hugging Face transformers: `python export.py run=... output=...`.

A checkpoint of any layout becomes a folder with config.json, safetensors, the tokenizer and a model
card. No more than one tensor is in memory, but for the comparison with transformers at the end.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from configs import (
    Config,
    Range,
    UserError,
    exit_on_config_error,
    exit_with_error,
    load_settings,
    machine_errors_as_user_errors,
    run_config,
)
from interop.atomic_directory import new_folder, require_new


@dataclass(frozen=True)
class Settings:
    """Write a checkpoint of a run as a model for Hugging Face transformers.

    Llama-shaped models become LlamaForCausalLM, GPT-shaped ones GPT2LMHeadModel; see
    docs/interop.md.
    """

    run: str  # the folder of a run, such as runs/gpt_laptop
    output: str  # the folder to make
    step: int | None = None  # of the checkpoint; null: the newest
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights in the files
    max_shard_gib: float = 5.0  # of one file of weights, unless a single tensor is larger
    # Load the result with transformers, where it is installed, and compare logits and tokens. Needs
    # memory for the whole model.
    check: bool = True
    RANGES: ClassVar = {"step": Range(0), "max_shard_gib": Range(0, open_low=True)}


if __name__ == "__main__":
    # Before torch is imported, which takes seconds, so that a mistyped key is answered at once.
    SETTINGS = load_settings(Settings, sys.argv[1:])
    with exit_on_config_error():
        CONFIG = run_config(SETTINGS.run, precision="fp32")
        require_new(Path(SETTINGS.output).expanduser(), "output")

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints import (
    Checkpoint,
    CheckpointError,
    held_checkpoint,
)
from checkpoints.full_tensors import TensorInfo, read_full_tensor, write_tensors
from data import Tokenizer, load_tokenizer
from interop.check import Comparison, compare, our_logits, some_tokens
from interop.huggingface import to_huggingface
from interop.huggingface_config import family_of, to_huggingface_config
from interop.model_card import model_card
from interop.tokenizer_json import tokenizer_config, tokenizer_json
from parallel import DeviceError, Mesh, close_mesh, init_mesh
from tracking.console import set_up_logging
from training.inference import exit_on_error, require_fingerprint
from training.optimizer import WEIGHTS

# What float32 sums of another order may differ by, as a fraction of the largest logit.
_ROUNDING = 1e-4


def export(settings: Settings, config: Config, mesh: Mesh) -> Comparison | None:
    """Find the checkpoint and export it; every rank calls this."""
    run = Path(settings.run).expanduser()
    family_of(config.model)
    with held_checkpoint(run / "checkpoints", mesh, settings.step, prefix=WEIGHTS) as checkpoint:
        if checkpoint is None:
            raise CheckpointError(f"run={settings.run} has no checkpoint yet")
        return export_checkpoint(checkpoint, settings, config, mesh)


def export_checkpoint(
    checkpoint: Checkpoint, settings: Settings, config: Config, mesh: Mesh
) -> Comparison | None:
    """Write the folder and compare; every rank calls this, rank 0 writes."""
    run = Path(settings.run).expanduser()
    tokenizer = load_tokenizer(run / "tokenizer.model", "the run's tokenizer.model")
    require_fingerprint(checkpoint, "tokenizer", tokenizer.fingerprint)
    files = small_files(settings, config, checkpoint, tokenizer)
    tokens = some_tokens(config, tokenizer.vocab_size)
    is_checked = settings.check and importlib.util.find_spec("transformers") is not None
    ours = our_logits(config, checkpoint, tokens, mesh) if is_checked else None
    if mesh.world.rank > 0:
        return None
    with new_folder(Path(settings.output).expanduser(), "output") as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        write_weights(folder, settings, config, checkpoint)
        if ours is None:
            return None
        comparison = compare(folder, ours, tokens, tokenizer)
        require_same(comparison, settings.dtype)
    return comparison


def small_files(
    settings: Settings, config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> dict[str, bytes]:
    """The contents of all files but the weights; ValueError if theirs cannot say what ours does."""
    symbols = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    options = to_huggingface_config(config.model, config.data.vocab_size)
    without_piece = [*range(tokenizer.vocab_size, config.data.vocab_size)]
    contents: dict[str, Any] = {
        "config.json": options | symbols | {"dtype": settings.dtype},
        "generation_config.json": symbols
        | {"pad_token_id": tokenizer.eos_id}
        | ({"suppress_tokens": without_piece} if without_piece else {}),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, config.model.seq_length),
    }
    metrics = Path(settings.run).expanduser() / "metrics.jsonl"
    card = model_card(config, checkpoint, metrics, options["architectures"][0])
    files = {name: _json(content).encode() for name, content in contents.items()}
    return files | {"tokenizer.model": tokenizer.model, "README.md": card.encode()}


def _json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_weights(folder: Path, settings: Settings, config: Config, checkpoint: Checkpoint) -> None:
    """Write model.safetensors, or several files and their index, a tensor at a time."""
    shapes = {
        name.removeprefix(WEIGHTS): entry["shape"]
        for name, entry in checkpoint.tensors.items()
        if name.startswith(WEIGHTS)
    }
    made = to_huggingface(shapes, family_of(config.model), config.model)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    infos = {
        name: TensorInfo(dtype, make(lambda ours: torch.empty(shapes[ours], device="meta")).shape)
        for name, make in made.items()
    }

    def make(name: str) -> Tensor:
        tensor = made[name](lambda ours: read_full_tensor(checkpoint, f"{WEIGHTS}{ours}")).to(dtype)
        if not all(end.isfinite() for end in tensor.aminmax()):  # makes no tensor of its size
            raise UserError(f"{name} has values that dtype={settings.dtype} cannot hold")
        return tensor

    files = split(infos, int(settings.max_shard_gib * 2**30))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        several = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / f"model{several}.safetensors"
        write_tensors(path, part, make)
        weight_map |= dict.fromkeys(part, path.name)
    if len(files) > 1:
        sizes = [info.num_bytes for info in infos.values()]
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(_json(index), "utf-8")


def split(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """The tensors of each file, in order: files of at most `max_bytes`, or of one tensor."""
    files: list[dict[str, TensorInfo]] = []
    free = 0
    for name, info in infos.items():
        if not files or info.num_bytes > free:
            files.append({})
            free = max_bytes
        files[-1][name] = info
        free -= info.num_bytes
    return files


def require_same(comparison: Comparison, dtype: str) -> None:
    """Raises UserError if transformers makes something else of the folder."""
    rounds = dtype != "float32" or comparison.logits < _ROUNDING * comparison.largest
    if comparison.num_texts or not rounds:
        raise UserError(
            f"transformers does not give what ours does, so nothing was written: {comparison}; "
            "check=false writes it all the same"
        )


@record
def main(settings: Settings, config: Config) -> int:
    """Join the other ranks and export."""
    parallel = config.parallel
    try:
        mesh = init_mesh(parallel.tensor_model_parallel_size, parallel.sequence_parallel)
    except DeviceError as error:
        exit_with_error(str(error))
    set_up_logging(mesh.world.rank)
    with exit_on_error(), machine_errors_as_user_errors(f"write output={settings.output}"):
        comparison = export(settings, config, mesh)
    if mesh.world.rank == 0:
        checked = f"with transformers: {comparison}" if comparison else "not loaded to check it"
        sys.stdout.write(f"{settings.output}: written, {checked}\n")
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS, CONFIG))
