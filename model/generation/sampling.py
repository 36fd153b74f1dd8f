"""Sampling of the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from parallel import fold_seed

_DRAW_BITS = 40  # few enough that a draw times a total rounds to less than the total


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p."""

    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # keep this many of the likeliest tokens; None: all
    top_p: float | None = None  # keep the fewest tokens with this total probability; None: all
    seed: int = 0


def sample_tokens(logits: Tensor, sampling: Sampling, draws: list[float]) -> Tensor:
    """Sample a token for each row of logits `[b, v]` from one uniform draw in [0, 1) each; `[b]`.

    Inverts the cumulative distribution over ids in order, so that rounding differences in the
    logits rarely change the token.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    cumulative = filtered_probs(logits, sampling).cumsum(dim=-1)
    uniform = torch.tensor(draws, dtype=cumulative.dtype, device=cumulative.device).unsqueeze(1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Unnormalised probabilities after the filters, `[b, v]` float64; 0 for a removed token."""
    logits = logits.double()
    if not logits.isfinite().all():
        raise UserError("the model's logits contain NaN or inf; its weights are damaged")
    # Subtract the maximum, so that no small temperature makes a logit infinite.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return scaled.softmax(dim=-1)
    # Stable: of equal logits the lower id comes first, so exactly top_k remain.
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = float("-inf")
    probs = ordered.softmax(dim=-1)
    if sampling.top_p is not None:
        preceding = probs.cumsum(dim=-1) - probs
        probs[preceding >= sampling.top_p] = 0.0
    return torch.zeros_like(probs).scatter_(-1, ids, probs)


def uniform_draw(sampling: Sampling, sample: int, position: int) -> float:
    """A number in [0, 1) that is a function of the seed, the sample and the token's position."""
    return (fold_seed(sampling.seed, sample, position) >> (63 - _DRAW_BITS)) / 2**_DRAW_BITS
