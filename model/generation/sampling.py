"""How the next token is chosen from the logits of all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from parallel import fold_seed

_DRAW_BITS = 40  # few enough that a draw times any total stays below it


@dataclass(frozen=True)
class Sampling:
    """Temperature first; then the `top_k` likeliest; then the fewest that have `top_p` together."""

    temperature: float = 1.0  # 0: always the likeliest
    top_k: int | None = None  # None: all
    top_p: float | None = None  # of the probability of those that are left; None: all
    seed: int = 0


def choose(logits: Tensor, sampling: Sampling, draws: list[float]) -> Tensor:
    """A token for each row of logits `[b, v]`, given a draw from [0, 1) for each; `[b]`.

    A draw is a place among the probabilities laid end to end in the order of the ids, so that a
    difference in the last bits of logits hardly ever changes the token.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    ends = filtered_probs(logits, sampling).cumsum(dim=-1)
    places = torch.tensor(draws, dtype=ends.dtype, device=ends.device).unsqueeze(1) * ends[:, -1:]
    return torch.searchsorted(ends, places, right=True).squeeze(1)


def filtered_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """What the tokens' probabilities are in proportion to, `[b, v]` float64; 0: never chosen."""
    logits = logits.double()
    if not logits.isfinite().all():
        raise UserError("the model gives logits that are not finite; its weights are damaged")
    # The largest is 0, so that no temperature makes it infinite.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return scaled.softmax(dim=-1)
    # Of equals the lower id comes first, and exactly top_k are left.
    ordered, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[:, sampling.top_k :] = float("-inf")
    of_ordered = ordered.softmax(dim=-1)
    if sampling.top_p is not None:
        of_those_before = of_ordered.cumsum(dim=-1) - of_ordered
        of_ordered[of_those_before >= sampling.top_p] = 0.0
    return torch.zeros_like(of_ordered).scatter_(-1, ids, of_ordered)


def draw(sampling: Sampling, sample: int, number: int) -> float:
    """A number from [0, 1) that depends on the seed, the sample and the token's number alone."""
    return (fold_seed(sampling.seed, sample, number) >> (63 - _DRAW_BITS)) / 2**_DRAW_BITS
