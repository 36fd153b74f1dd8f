"""Dropout whose mask is a hash, recomputed in backward instead of stored unless it is tiny.

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
    return keep_masks(positions, prepare_keys(keys), shape[2], rate)


def keep_masks(rows: Tensor, keys: Tensor, channels: int, rate: float) -> Tensor:
    """Masks of rows `[s/t]` for prepared keys `[..., 2, b]`, as booleans `[..., s/t, b, h]`."""
    return _hash(rows, keys, channels) >= _threshold(rate)


def _threshold(rate: float) -> int:
    """Hashes are uniform over the signed 32-bit integers; elements below this are dropped."""
    return int(rate * 2**32) - 2**31


def mask_counters(positions: Tensor, channels: int) -> Tensor:
    """The counters of elements, `[s/t, 1, h]` int32, after the first xorshift; positions `[s/t]`.

    An xorshift of counter ^ key is that of the counter ^ that of the key, so all masks of a
    micro-batch can share it.
    """
    counters = positions.view(-1, 1, 1) * channels  # wraps around, as intended
    counters = counters + torch.arange(channels, dtype=torch.int32, device=positions.device)
    return counters ^ _shift_right(counters, 16)


def prepare_keys(keys: Tensor) -> Tensor:
    """Keys `[..., 2, b]` after the first xorshift."""
    first, second = keys.unbind(-2)
    return torch.stack((first ^ _shift_right(first, 16), second), -2)


def _hash(rows: Tensor, keys: Tensor, channels: int) -> Tensor:
    """Hash the elements of rows, given as positions or `mask_counters`, with prepared keys."""
    counters = mask_counters(rows, channels) if rows.ndim == 1 else rows
    first, second = keys[..., None, :, None].unbind(-4)
    x = counters ^ first
    x *= _MULTIPLIER_1
    x ^= second
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


def _drop(x: Tensor, keys: Tensor, rows: Tensor | None, threshold: Scalar, scale: Scalar) -> Tensor:
    """m x / (1 - p)."""
    mask = keys if rows is None else _hash(rows, keys, x.shape[2]) >= threshold
    # A bfloat16 x would round a 0-dim scale first, so multiply in the scale's dtype.
    wide = x.to(scale.dtype) if isinstance(scale, Tensor) else x
    return (wide * scale).to(x.dtype).mul_(mask)


def _drop_and_add(x: Tensor, residual: Tensor, *mask: Any) -> Tensor:
    """r + m x / (1 - p)."""
    return _drop(x, *mask).add_(residual)


class _DropoutAdd(torch.autograd.Function):
    """y = r + m x / (1 - p).     dr = dy.     dx = m dy / (1 - p).     Saves no activations.

    A stored mask is an attribute of the context and not a saved tensor: a recomputed block stops
    before its last saved tensor, and so does not repeat what comes before this dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        rate: float,
        keys: Tensor,
        rows: Tensor | None,
        compile: bool,
    ) -> Tensor:
        ctx.mask = (keys, rows, *_scalars(rate, compile, x.device))
        ctx.compile, ctx.has_residual = compile, residual is not None
        if residual is None:
            return maybe_compile(_drop, compile)(x, *ctx.mask)
        return maybe_compile(_drop_and_add, compile)(x, residual, *ctx.mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = maybe_compile(_drop, ctx.compile)(grad_y, *ctx.mask)
        return grad_x, grad_y if ctx.has_residual else None, None, None, None, None


# y for x `[s/t, b, h]` and a residual r or None, with prepared keys `[2, b]`. Rows are their global
# positions, `[s/t]` int32, or the `mask_counters` of these, which only a compiled kernel computes
# for free. With a stored mask `[s/t, b, h]` in place of keys, rows are None; never compile that.
hashed_dropout_add = _DropoutAdd.apply
