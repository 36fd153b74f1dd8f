"""Dropout whose mask is a hash, recomputed in backward instead of stored.

A sample has a 64-bit key per dropout site, an element a 32-bit counter: position x channels +
channel. Two rounds of multiplication and xorshift mix them, so any part of a mask can be computed
by itself.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from ops.compile import maybe_compile

# lowbias32 of Wellons' hash-prospector: every input bit flips every output bit with probability
# near one half.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # the same bits as a signed 32-bit integer


def dropout_keys(seed: int, step: int, samples: Sequence[int], num_layers: int) -> Tensor:
    """The keys of all sites for a micro-batch, `[1 + 2 L, 2, b]` int32; rows by `site_index`.

    `samples` `[b]` are counted over the whole run and all ranks.
    """
    sites = [(-1, 0), *((layer, site) for layer in range(num_layers) for site in (1, 2))]
    digests = b"".join(
        xxhash.xxh3_64_digest(struct.pack("<5q", seed, step, layer, site, sample))
        for layer, site in sites
        for sample in samples
    )
    keys = torch.frombuffer(bytearray(digests), dtype=torch.int32)
    return keys.view(len(sites), len(samples), 2).transpose(1, 2).contiguous()


def site_index(layer: int, site: int) -> int:
    """The row of `dropout_keys`: site 0 is before layer 0, sites 1 and 2 are in each layer."""
    return 2 * layer + site if site else 0


def keep_mask(shape: torch.Size, first_position: int, rate: float, keys: Tensor) -> Tensor:
    """Which elements of a `[s/t, b, h]` activation survive dropout at `rate`, as booleans.

    `first_position` is the global position of row 0, `keys` are `[2, b]` int32.
    """
    positions = torch.arange(shape[0], dtype=torch.int32, device=keys.device) + first_position
    return _hash(shape, positions, keys) >= _threshold(rate)


def _threshold(rate: float) -> int:
    """Hashes are uniform over the signed 32-bit integers; elements below this are dropped."""
    return int(rate * 2**32) - 2**31


def _hash(shape: torch.Size, positions: Tensor, keys: Tensor) -> Tensor:
    _, batch, channels = shape
    counter = positions.view(-1, 1, 1) * channels  # wraps around, as intended
    counter = counter + torch.arange(channels, dtype=torch.int32, device=keys.device)
    x = counter ^ keys[0].view(1, batch, 1)
    x ^= _shift_right(x, 16)
    x *= _MULTIPLIER_1
    x ^= keys[1].view(1, batch, 1)
    x ^= _shift_right(x, 15)
    x *= _MULTIPLIER_2
    x ^= _shift_right(x, 16)
    return x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32; torch's own repeats the sign bit."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


Scalar = float | Tensor


@functools.cache
def _scalars(rate: float, compile: bool, device: torch.device) -> tuple[Scalar, Scalar]:
    """Threshold and scale of a rate: numbers, or tensors for a compiled kernel.

    Never pass the rate itself to a kernel: torch 2.13 may compile it in as a constant and then
    reuse that kernel, also from its disk cache, for other rates.
    """
    threshold, scale = _threshold(rate), 1.0 / (1.0 - rate)
    if not compile:
        return threshold, scale
    return (
        torch.full((), threshold, dtype=torch.int32, device=device),
        torch.full((), scale, dtype=torch.float32, device=device),
    )


def _drop(x: Tensor, keys: Tensor, positions: Tensor, threshold: Scalar, scale: Scalar) -> Tensor:
    """m x / (1 - p)."""
    # A bfloat16 x would round a 0-dim scale first, so multiply in the scale's dtype.
    wide = x.to(scale.dtype) if isinstance(scale, Tensor) else x
    return (wide * scale).to(x.dtype).mul_(_hash(x.shape, positions, keys) >= threshold)


def _drop_and_add(x: Tensor, residual: Tensor, *mask: Any) -> Tensor:
    """r + m x / (1 - p)."""
    return _drop(x, *mask).add_(residual)


class _DropoutAdd(torch.autograd.Function):
    """y = r + m x / (1 - p).     dr = dy.     dx = m dy / (1 - p).     Saves only the keys."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        rate: float,
        keys: Tensor,
        positions: Tensor,
        compile: bool,
    ) -> Tensor:
        ctx.mask = (keys, positions, *_scalars(rate, compile, x.device))
        ctx.compile, ctx.has_residual = compile, residual is not None
        if residual is None:
            return maybe_compile(_drop, compile)(x, *ctx.mask)
        return maybe_compile(_drop_and_add, compile)(x, residual, *ctx.mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = maybe_compile(_drop, ctx.compile)(grad_y, *ctx.mask)
        return grad_x, grad_y if ctx.has_residual else None, None, None, None, None


# y for x `[s/t, b, h]`, a residual r or None, and the global position of each row, `[s/t]` int32.
hashed_dropout_add = _DropoutAdd.apply
