"""Rotary position embedding (Su et al. 2021): a head's channels turn as positions go by.

Channel i is paired with channel i + d/2, as in Hugging Face's models (the paper pairs neighbours;
the two differ by a permutation of the rows of q and k).
"""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles, each [s, b, 1, d/2]


def rotary_cos_sin(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Rotation:
    """The rotation at each position: pair i of d/2 has turned by position / base^(2 i / d).

    `positions` `[s, b]`: all of them and not a sequence shard, since queries and keys have all.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None, None] * base ** (-pairs / head_dim)  # [s, b, 1, d/2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads `[s, b, a/t, d]` of each position by its angles."""
    first, second = x.chunk(2, dim=-1)  # each [s, b, a/t, d/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
