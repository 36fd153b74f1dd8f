"""An exported model beside ours: the same logits, and the same ids for odd texts."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoints import Checkpoint, load_tensors
from configs import Config
from data import Tokenizer
from model import build_inference_model
from parallel import Mesh
from training.optimizer import WEIGHTS, weight_tensors

ROWS, LENGTH = 2, 128  # of the tokens that both are given, at most
NUM_TEXTS, _LONGEST_TEXT = 1000, 60
# Besides the tokenizer's own pieces: white space, what looks like a control piece, rare characters.
_ODD = [" ", "  ", "\n", "\t", "\r\n", "\0", "\u2581", "<s>", "</s>", "<unk>", "<0x0A>", "\u00e9"]
_ODD += ["e\u0301", "\ufb01", "\uff21", "\u6f22", "\U0001f600", "\u200d", "\u2028", "\ufeff", "7"]


@dataclass(frozen=True)
class Comparison:
    """How far theirs is from ours."""

    logits: float  # largest difference
    largest: float  # logit of ours
    num_likeliest: int  # positions at which another token is the likeliest
    num_positions: int
    num_texts: int  # texts that their tokenizer gives other ids

    def __str__(self) -> str:
        return (
            f"logits differ by {self.logits:.1e} at most (the largest is {self.largest:.1f}), and "
            f"the likeliest token at {self.num_likeliest} of {self.num_positions} positions; "
            f"{self.num_texts} of {NUM_TEXTS} texts get other tokens"
        )


def some_tokens(config: Config, num_ids: int) -> Tensor:
    """Rows of ids `[b, s]` to compare logits on."""
    generator = torch.Generator().manual_seed(config.run.seed % 2**63)
    length = min(LENGTH, config.model.seq_length)
    return torch.randint(num_ids, (ROWS, length), generator=generator)


@torch.no_grad()
def our_logits(config: Config, checkpoint: Checkpoint, tokens: Tensor, mesh: Mesh) -> Tensor:
    """Float32 logits `[b, s, v]` of a checkpoint; every rank calls this and gets the same."""
    model, length = build_inference_model(config, mesh), tokens.shape[1]
    load_tensors(checkpoint, weight_tensors(model), mesh, prefix=WEIGHTS, converts=True)
    # Padded to a multiple of t at the end, where causal attention cannot see it.
    padding = (0, -length % mesh.tp.size)
    positions = F.pad(torch.arange(length), padding).repeat(len(tokens), 1)
    logits: Tensor = model(F.pad(tokens, padding).to(mesh.device), positions.to(mesh.device))
    return logits[:, :length].cpu()


@torch.no_grad()
def compare(folder: Path, ours: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> Comparison:
    """Load an exported folder with transformers and compare it with our logits of `tokens`."""
    transformers = _quiet_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    theirs: Tensor = model(tokens).logits
    del model
    differs = theirs.argmax(-1) != ours.argmax(-1)
    auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = odd_texts(tokenizer, NUM_TEXTS)
    pairs = zip(auto(texts)["input_ids"], tokenizer.encode_batch(texts), strict=True)
    return Comparison(
        logits=(theirs - ours).abs().max().item(),
        largest=ours.abs().max().item(),
        num_likeliest=int(differs.sum()),
        num_positions=differs.numel(),
        num_texts=sum(other != mine.tolist() for other, mine in pairs),
    )


def odd_texts(tokenizer: Tokenizer, number: int) -> list[str]:
    """Texts of pieces, white space and rare characters in any order; the same each time."""
    rng = random.Random(number)
    texts = []
    for _ in range(number):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(_LONGEST_TEXT))
        parts = [rng.choice(_ODD) if rng.random() < 1 / 2 else tokenizer.decode([i]) for i in ids]
        texts.append("".join(parts))
    return texts


def _quiet_transformers() -> Any:
    # Here: it takes seconds, and who exports need not have it.
    import transformers  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return transformers
