"""The order of training samples as a pure function of seed and epoch.

Sample i of a source is row permutation(seed, i // n)[i % n] of its n rows. No state and no list of
n numbers is kept: a permutation of [0, n) is a small block cipher, so any part of any epoch is
computed where it is needed, and the state of the sampler is the number of consumed samples alone.
"""

import numpy as np
import numpy.typing as npt

_ROUNDS = 4  # make a strong pseudo-random permutation (Luby and Rackoff 1988)
_MASK_64 = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def sample_rows(
    samples: npt.NDArray[np.int64], num_rows: int, seed: int, source: int = 0
) -> npt.NDArray[np.int64]:
    """Returns the rows of a source's samples, given by their numbers among its samples."""
    seed += source * _ODD  # the sources of a mixture are shuffled differently
    epochs, places = np.divmod(samples, num_rows)
    rows = np.empty_like(samples)
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        rows[in_epoch] = permute(places[in_epoch], num_rows, seed, epoch)
    return rows


def permute(
    places: npt.NDArray[np.int64], size: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Returns where a pseudo-random permutation of [0, size) sends each of the places.

    A Feistel network permutes [0, 4^k), the smallest such range that holds `size`. Values that fall
    outside [0, size) are sent on until they fall inside (cycle walking), which leaves a permutation
    of [0, size).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = [_mix(_mix(_mix(seed & _MASK_64) ^ epoch) ^ number) for number in range(_ROUNDS)]
    values = _feistel(places.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], half_bits: int, keys: list[int]
) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) after one step of its counter."""
    return int(_mix_array(np.array([value], dtype=np.uint64))[0])


def _mix_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(_ODD)  # wraps around, as intended
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
