"""How context parallelism balances causal attention: which positions of a row each rank has."""

from typing import TypedDict

import torch
from torch import Tensor


class CPRank(TypedDict, total=False):
    """Arguments that name a rank on the context-parallel axis; omitted without that axis."""

    cp_rank: int
    cp_size: int


def balanced_positions(
    length: int, rank: int, size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Positions of one of `size` ranks in a row: chunks `rank` and 2c - 1 - `rank` of 2c; `[s/c]`.

    `length`, s, is a multiple of 2c. Attention to the last chunk costs most, so every rank gets one
    cheap and one expensive chunk (Llama 3, arXiv 2407.21783, section 3.3.2).
    """
    positions = torch.arange(length, device=device)
    if size == 1:
        return positions
    chunks = positions.chunk(2 * size)
    return torch.cat((chunks[rank], chunks[-1 - rank]))


def width_multiple(cp_size: int, tp_size: int) -> int:
    """Rows are padded to a multiple of this: equal chunks, each of which tp splits evenly."""
    return tp_size if cp_size == 1 else 2 * cp_size * tp_size
