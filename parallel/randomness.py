"""Randomness as a pure function: a mask is named, not drawn.

Nothing here depends on the layout or on what was drawn before. A dropout mask is a function of
(seed, step, layer, site, global sample index, global position, channel): the first five are hashed
on the host into a 64-bit key per sample, the last two are a 32-bit counter, and a finaliser of two
multiplications mixes counter and key. Every rank can therefore make just its part of a mask, and
backward and recomputation make it again instead of storing it.
"""

import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from parallel.collectives import move_to
from parallel.fusion import fused
from parallel.mesh import Mesh

# The multipliers of Wellons' hash-prospector search (lowbias32): two rounds of xorshift and
# multiply in which every input bit flips every output bit with probability near one half.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # the same bits as a signed 32-bit integer


def fold_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and all of `parts`."""
    text = "/".join([str(seed), *(str(part) for part in parts)])
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


@dataclass(frozen=True)
class DropoutStream:
    """Names all dropout masks of one micro-batch."""

    seed: int
    step: int
    sample_indices: tuple[int, ...]  # [b], counted over the whole run and over all ranks

    def keys(self, layer: int, site: int, device: torch.device) -> Tensor:
        """Two 32-bit words of key for each sample of the micro-batch, `[2, b]` int32."""
        digests = (
            xxhash.xxh3_64_digest(struct.pack("<5q", self.seed, self.step, layer, site, sample))
            for sample in self.sample_indices
        )
        words = [struct.unpack("<2i", digest) for digest in digests]
        return move_to(torch.tensor(words, dtype=torch.int32), device).t()

    def attention_seed(self, layer: int, tp_rank: int) -> int:
        """Seed of the attention dropout of one layer, the one that depends on the layout."""
        return fold_seed(self.seed, "attention", self.step, layer, self.sample_indices[0], tp_rank)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32; torch's own repeats the sign bit."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def keep_mask(shape: torch.Size, first_position: int, rate: float, keys: Tensor) -> Tensor:
    """Which elements of a `[s/t, b, h]` activation survive dropout at `rate`, as booleans.

    `first_position` is the global position of row 0, `keys` are `[2, b]` int32.
    """
    return _hashes(shape, first_position, keys) >= _threshold(rate)


def _threshold(rate: float) -> int:
    """The hashes are uniform over the signed 32-bit integers; those below this are dropped."""
    return int(rate * 2**32) - 2**31


def _hashes(shape: torch.Size, first_position: int, keys: Tensor) -> Tensor:
    positions, batch, channels = shape
    start = first_position * channels
    counter = torch.arange(
        start, start + positions * channels, dtype=torch.int32, device=keys.device
    )
    x = counter.view(positions, 1, channels) ^ keys[0].view(1, batch, 1)
    x ^= _shift_right(x, 16)
    x *= _MULTIPLIER_1
    x ^= keys[1].view(1, batch, 1)
    x ^= _shift_right(x, 15)
    x *= _MULTIPLIER_2
    x ^= _shift_right(x, 16)
    return x


Scalar = float | Tensor


@functools.cache
def _scalars(rate: float, compiles: bool, device: torch.device) -> tuple[Scalar, Scalar]:
    """Threshold and scale of dropout at a rate, as numbers, or for a compiled kernel as tensors.

    A kernel must not be given the rate: whether the compiler makes it a constant is a setting of
    the calling thread, and torch 2.13 then makes a constant of int(rate * 2**32) alone and takes
    that kernel, from its cache on disk too, for any rate.
    """
    threshold, scale = _threshold(rate), 1.0 / (1.0 - rate)
    if not compiles:
        return threshold, scale
    return (
        torch.full((), threshold, dtype=torch.int32, device=device),
        torch.full((), scale, dtype=torch.float32, device=device),
    )


def _drop(x: Tensor, keys: Tensor, first_position: int, threshold: Scalar, scale: Scalar) -> Tensor:
    """m x / (1 - p)."""
    # Times a tensor without dimensions, a bfloat16 x would round the tensor first.
    wide = x.to(scale.dtype) if isinstance(scale, Tensor) else x
    return (wide * scale).to(x.dtype).mul_(_hashes(x.shape, first_position, keys) >= threshold)


def _drop_and_add(
    x: Tensor,
    residual: Tensor,
    keys: Tensor,
    first_position: int,
    threshold: Scalar,
    scale: Scalar,
) -> Tensor:
    """r + m x / (1 - p)."""
    return _drop(x, keys, first_position, threshold, scale).add_(residual)


class _DropoutAdd(torch.autograd.Function):
    """y = r + m x / (1 - p).     dr = dy.     dx = m dy / (1 - p).

    Nothing but the keys is saved: the mask m is made again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        keys: Tensor,
        first_position: int,
        rate: float,
        compiles: bool,
    ) -> Tensor:
        ctx.mask = (keys, first_position, *_scalars(rate, compiles, x.device))
        ctx.compiles, ctx.has_residual = compiles, residual is not None
        if residual is None:
            return fused(_drop, compiles)(x, *ctx.mask)
        return fused(_drop_and_add, compiles)(x, residual, *ctx.mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = fused(_drop, ctx.compiles)(grad_y, *ctx.mask)
        return grad_x, grad_y if ctx.has_residual else None, None, None, None, None


def dropout_add(
    x: Tensor,
    residual: Tensor | None,
    rate: float,
    stream: DropoutStream | None,
    layer: int,
    site: int,
    mesh: Mesh,
) -> Tensor:
    """`residual + dropout(x)` on the local sequence shard `[s/t, b, h]`; None adds nothing.

    No stream (evaluation) or a rate of zero: no dropout.
    """
    if stream is None or rate == 0.0:
        return x if residual is None else x + residual
    first_position = mesh.tp.rank * x.shape[0] if mesh.sequence_parallel else 0
    keys = stream.keys(layer, site, x.device)
    return _DropoutAdd.apply(x, residual, keys, first_position, rate, mesh.compiles)
