"""Comparison of an exported model with the original: logits, and token ids of unusual texts."""

import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoints import Checkpoint, load_tensors
from configs import Config
from data import Tokenizer
from model import build_inference_model
from parallel import Mesh
from training.optimizer import WEIGHTS, weight_tensors

_ROWS, _MAX_LENGTH = 2, 128
NUM_TEXTS, _MAX_PIECES = 2000, 60
# Mixed with the tokenizer's own pieces: white space, control pieces as text, rare characters.
_UNUSUAL = [" ", "  ", "\n", "\t", "\r\n", "\0", "\u2581", "<s>", "</s>", "<unk>", "<0x0A>"]
_UNUSUAL += ["\u00e9", "e\u0301", "\ufb01", "\uff21", "\u6f22", "\U0001f600", "\u200d", "\u2028"]
_UNUSUAL += ["\ufeff", "7"]


@dataclass(frozen=True)
class Comparison:
    """How much the exported model differs from the original."""

    max_difference: float  # of logits
    max_logit: float
    num_top1_differences: int  # positions with another most likely token
    num_positions: int
    num_text_differences: int  # texts with other token ids

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.max_difference:.1e} (largest logit "
            f"{self.max_logit:.1f}); top-1 token differs at {self.num_top1_differences} of "
            f"{self.num_positions} positions; tokenizer differs on {self.num_text_differences} of "
            f"{NUM_TEXTS} texts"
        )


def random_tokens(config: Config, num_ids: int) -> Tensor:
    """Token ids `[b, s]` to compare logits on."""
    generator = torch.Generator().manual_seed(config.run.seed % 2**63)
    length = min(_MAX_LENGTH, config.model.seq_length)
    return torch.randint(num_ids, (_ROWS, length), generator=generator)


@torch.no_grad()
def checkpoint_logits(config: Config, checkpoint: Checkpoint, tokens: Tensor, mesh: Mesh) -> Tensor:
    """Float32 logits `[b, s, v]` of a checkpoint; every rank calls this and gets all of them."""
    model, length = build_inference_model(config, mesh), tokens.shape[1]
    load_tensors(checkpoint, weight_tensors(model), prefix=WEIGHTS, converts=True)
    # Padded at the end to a multiple of t; causal attention does not see it.
    padding = (0, -length % mesh.tp.size)
    positions = F.pad(torch.arange(length), padding).repeat(len(tokens), 1)
    logits: Tensor = model(F.pad(tokens, padding).to(mesh.device), positions.to(mesh.device))
    return logits[:, :length].cpu()


@torch.no_grad()
def compare(folder: Path, logits: Tensor, tokens: Tensor, tokenizer: Tokenizer) -> Comparison:
    """Load an exported folder with transformers; compare with the original logits of `tokens`."""
    import transformers  # noqa: PLC0415  optional, and takes seconds

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    exported: Tensor = model(tokens).logits
    del model
    top1_differs = exported.argmax(-1) != logits.argmax(-1)
    exported_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = unusual_texts(tokenizer, NUM_TEXTS)
    exported_ids = exported_tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    pairs = zip(exported_ids, tokenizer.encode_batch(texts), strict=True)
    return Comparison(
        max_difference=(exported - logits).abs().max().item(),
        max_logit=logits.abs().max().item(),
        num_top1_differences=int(top1_differs.sum()),
        num_positions=top1_differs.numel(),
        num_text_differences=sum(theirs != ours.tolist() for theirs, ours in pairs),
    )


def unusual_texts(tokenizer: Tokenizer, number: int) -> list[str]:
    """Random sequences of pieces, white space and rare characters; the same in each call."""
    rng, unusual = random.Random(number), [*_UNUSUAL, tokenizer.bos_token, tokenizer.eos_token]
    texts = []
    for _ in range(number):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(_MAX_PIECES))
        pieces = (tokenizer.decode([i]) for i in ids)
        texts.append("".join(rng.choice(unusual) if rng.random() < 1 / 2 else p for p in pieces))
    return texts
