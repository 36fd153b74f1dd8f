"""Dropout whose mask is a hash, and is made again in backward instead of being stored.

Each sample has a 64-bit key, and each element of it a 32-bit counter: its position in the sequence
times the channels, plus its channel. A finaliser of two multiplications mixes counter and key, so
any part of a mask can be made by itself.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ops.compile import maybe_compile

# The multipliers of Wellons' hash-prospector search (lowbias32): two rounds of xorshift and
# multiply in which every input bit flips every output bit with probability near one half.
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # the same bits as a signed 32-bit integer


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
def _scalars(rate: float, compile: bool, device: torch.device) -> tuple[Scalar, Scalar]:
    """Threshold and scale of dropout at a rate, as numbers, or for a compiled kernel as tensors.

    A kernel must not be given the rate: whether the compiler makes it a constant is a setting of
    the calling thread, and torch 2.13 then makes a constant of int(rate * 2**32) alone and takes
    that kernel, from its cache on disk too, for any rate.
    """
    threshold, scale = _threshold(rate), 1.0 / (1.0 - rate)
    if not compile:
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
        compile: bool,
    ) -> Tensor:
        ctx.mask = (keys, first_position, *_scalars(rate, compile, x.device))
        ctx.compile, ctx.has_residual = compile, residual is not None
        if residual is None:
            return maybe_compile(_drop, compile)(x, *ctx.mask)
        return maybe_compile(_drop_and_add, compile)(x, residual, *ctx.mask)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = maybe_compile(_drop, ctx.compile)(grad_y, *ctx.mask)
        return grad_x, grad_y if ctx.has_residual else None, None, None, None, None


def hashed_dropout_add(
    x: Tensor,
    residual: Tensor | None,
    rate: float,
    keys: Tensor,
    first_position: int,
    compile: bool,
) -> Tensor:
    """`residual + dropout(x)` for `[s/t, b, h]`; a residual of None adds nothing.

    `keys` are `[2, b]` int32, `first_position` is the position in the sequence of row 0.
    """
    return _DropoutAdd.apply(x, residual, keys, first_position, rate, compile)
