"""Randomness as a pure function: nothing depends on the layout or on earlier draws.

A dropout mask is a function of (seed, step, layer, site, global sample index, global position,
channel). The host hashes the first five into a key per sample, `ops/dropout.py` hashes the rest, so
every rank can compute its part of a mask alone.
"""

import struct
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from ops.dropout import hashed_dropout_add
from parallel.collectives import move_to
from parallel.mesh import Mesh


def fold_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and all of `parts`."""
    text = "/".join([str(seed), *(str(part) for part in parts)])
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


@dataclass(frozen=True)
class DropoutStream:
    """Names all dropout masks of one micro-batch."""

    seed: int
    step: int
    sample_indices: tuple[int, ...]  # [b], counted over the whole run and all ranks

    def keys(self, layer: int, site: int, device: torch.device) -> Tensor:
        """A 64-bit key for each sample, `[2, b]` int32."""
        digests = (
            xxhash.xxh3_64_digest(struct.pack("<5q", self.seed, self.step, layer, site, sample))
            for sample in self.sample_indices
        )
        words = [struct.unpack("<2i", digest) for digest in digests]
        return move_to(torch.tensor(words, dtype=torch.int32), device).t()

    def attention_seed(self, layer: int, tp_rank: int) -> int:
        """The seed of attention dropout, the only randomness that depends on the layout."""
        return fold_seed(self.seed, "attention", self.step, layer, self.sample_indices[0], tp_rank)


def dropout_add(
    x: Tensor,
    residual: Tensor | None,
    rate: float,
    stream: DropoutStream | None,
    layer: int,
    site: int,
    mesh: Mesh,
) -> Tensor:
    """`residual + dropout(x)` for `[s/t, b, h]`; a `stream` of None or a rate of 0: no dropout."""
    if stream is None or rate == 0.0:
        return x if residual is None else x + residual
    first_position = mesh.tp.rank * x.shape[0] if mesh.sequence_parallel else 0
    keys = stream.keys(layer, site, x.device)
    return hashed_dropout_add(x, residual, rate, keys, first_position, mesh.compile)
