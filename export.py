"""Export a run to Hugging Face transformers: `python export.py run=runs/NAME output=DIR`.

Reads a checkpoint of any layout. Writes config.json, safetensors, the tokenizer and a model card.
Holds one tensor in memory at a time, except for the comparison with transformers at the end.
"""

import importlib.util
import json
import logging
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
    machine_errors_as_user_errors,
)
from configs.launch import is_rank_zero
from configs.program_settings import load_settings, run_config
from interop.atomic_directory import atomic_directory, require_new


@dataclass(frozen=True)
class Settings:
    """Export a checkpoint of a run to Hugging Face transformers.

    The model becomes a GPT-2, Llama, Qwen2, Qwen3 or StableLM; see docs/interop.md.
    """

    run: str  # the folder of a run, such as runs/gpt_laptop
    output: str  # the folder to create
    step: int | None = None  # of the checkpoint; null: the newest
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the exported weights
    max_shard_gib: float = 5.0  # size of one file of weights, unless a single tensor is larger
    # Load the result with transformers, if installed, and compare logits and token ids. Needs
    # memory for the whole model.
    check: bool = True
    RANGES: ClassVar = {"step": Range(0), "max_shard_gib": Range(0, open_low=True)}


if __name__ == "__main__":
    # Before the slow import of torch, so that invalid settings are reported at once.
    SETTINGS = load_settings(Settings, sys.argv[1:])
    with exit_on_config_error():
        CONFIG = run_config(SETTINGS.run, precision="fp32")
        require_new(Path(SETTINGS.output).expanduser(), "output")

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints import Checkpoint, held_checkpoint, require_fingerprint
from checkpoints.full_tensors import TensorInfo, read_full_tensor, write_tensors
from data import SentencePieceTokenizer, Tokenizer
from data.corpus.segments import CHAT_TEMPLATE
from interop.check import Comparison, checkpoint_logits, compare, random_tokens
from interop.huggingface import shapes_of, to_huggingface
from interop.huggingface_config import family_of, to_huggingface_config
from interop.model_card import model_card
from interop.tokenizer_json import encodes_chats_alike, tokenizer_config, tokenizer_json
from parallel import DeviceError, Mesh, close_mesh, init_mesh
from tracking.console import set_up_logging
from training.inference import load_run_tokenizer
from training.optimizer import WEIGHTS
from training.run_folder import exit_on_error

logger = logging.getLogger("microtron")

# Largest difference of float32 logits due to another order of sums, relative to the largest logit.
_TOLERANCE = 1e-4


def export(settings: Settings, config: Config, mesh: Mesh) -> Comparison | None:
    """Export a checkpoint and compare the result; every rank calls this, rank 0 writes."""
    run = Path(settings.run).expanduser()
    family_of(config.model)
    with held_checkpoint(run / "checkpoints", mesh, settings.step, prefix=WEIGHTS) as checkpoint:
        if checkpoint is None:
            raise UserError(f"run={settings.run} has no checkpoint yet")
        tokenizer = load_run_tokenizer(run, config)
        require_fingerprint(checkpoint, "tokenizer", tokenizer.fingerprint)
        files = small_files(settings, config, checkpoint, tokenizer)
        tokens, logits = random_tokens(config, tokenizer.vocab_size), None
        if settings.check and importlib.util.find_spec("transformers") is not None:
            logits = checkpoint_logits(config, checkpoint, tokens, mesh)
        if mesh.world.rank > 0:
            return None
        with atomic_directory(Path(settings.output).expanduser(), "output") as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
            write_weights(folder, settings, config, checkpoint)
            if logits is None:
                return None
            comparison = compare(folder, logits, tokens, tokenizer)
            require_equal(comparison, settings.dtype)
        return comparison


def small_files(
    settings: Settings, config: Config, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> dict[str, bytes]:
    """The contents of all files except the weights; UserError if something has no counterpart."""
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    options = to_huggingface_config(config.model, config.data.padded_vocab_size)
    generation: dict[str, Any] = {**token_ids, "pad_token_id": tokenizer.eos_id}
    if unused_ids := [*range(tokenizer.vocab_size, config.data.padded_vocab_size)]:
        generation["suppress_tokens"] = unused_ids
    is_chat = any(source.format == "messages" for source in config.data.mixture.values())
    files = {tokenizer.file_name: tokenizer.content}
    if isinstance(tokenizer, SentencePieceTokenizer):
        files["tokenizer.json"] = _json(tokenizer_json(tokenizer))
    template = CHAT_TEMPLATE if is_chat else None
    if is_chat and not encodes_chats_alike(tokenizer, files["tokenizer.json"]):
        template = None
        if is_rank_zero():
            logger.warning(
                "exported without chat_template: transformers encodes a conversation as a whole, "
                "training each message alone, and this tokenizer then gives other tokens"
            )
    contents: dict[str, Any] = {
        "config.json": {**options, **token_ids, "dtype": settings.dtype},
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config(tokenizer, config.model.seq_length, template),
    }
    metrics = Path(settings.run).expanduser() / "metrics.jsonl"
    card = model_card(config, checkpoint, metrics, options["architectures"][0])
    files |= {name: _json(content) for name, content in contents.items()}
    return files | {"README.md": card.encode()}


def _json(content: object) -> bytes:
    return f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()


def write_weights(folder: Path, settings: Settings, config: Config, checkpoint: Checkpoint) -> None:
    """Write model.safetensors, or several files and their index, one tensor at a time."""
    shapes = {
        name.removeprefix(WEIGHTS): entry["shape"]
        for name, entry in checkpoint.tensors.items()
        if name.startswith(WEIGHTS)
    }
    makers = to_huggingface(shapes, family_of(config.model), config.model)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    infos = {name: TensorInfo(dtype, shape) for name, shape in shapes_of(makers, shapes).items()}

    def make(name: str) -> Tensor:
        tensor = makers[name](lambda ours: read_full_tensor(checkpoint, f"{WEIGHTS}{ours}"))
        tensor = tensor.to(dtype)
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # needs no second tensor
            raise UserError(f"{name} has values that dtype={settings.dtype} cannot represent")
        return tensor

    files = split(infos, int(settings.max_shard_gib * 2**30))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, start=1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / f"model{suffix}.safetensors"
        write_tensors(path, part, make)
        weight_map |= dict.fromkeys(part, path.name)
    if len(files) > 1:
        total_size = sum(info.num_bytes for info in infos.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_bytes(_json(index))


def split(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    """Distribute tensors, in order, over files of at most `max_bytes` or of one tensor."""
    files: list[dict[str, TensorInfo]] = []
    free = 0
    for name, info in infos.items():
        if not files or info.num_bytes > free:
            files.append({})
            free = max_bytes
        files[-1][name] = info
        free -= info.num_bytes
    return files


def require_equal(comparison: Comparison, dtype: str) -> None:
    """Raise UserError if token ids differ, or float32 logits by more than rounding."""
    is_close = comparison.max_difference < _TOLERANCE * comparison.max_logit
    if comparison.num_text_differences or not (is_close or dtype != "float32"):
        raise UserError(
            f"the exported model differs in transformers, so nothing was written: {comparison}; "
            "check=false writes it anyway"
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
        result = f"checked with transformers: {comparison}" if comparison else "check skipped"
        sys.stdout.write(f"{settings.output}: written ({result})\n")
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS, CONFIG))
