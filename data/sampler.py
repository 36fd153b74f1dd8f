"""The order of training samples, a pure function of seed and sample number.

A mixture follows a schedule of 2^16 samples, repeated, in which the samples of each source are
spread evenly by weight. Sources start at different points of their periods, so that many small ones
do not come together. Sample i of a source is row permutation(seed, i // n)[i % n] of its n rows.
The permutation is a small block cipher: any part of any epoch is computed on demand, and the number
of consumed samples is the sampler's only state.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data.packing import Int64Array

_SCHEDULE = 1 << 16  # samples, so a weight is exact to 2^-16 of the sum of weights
_GOLDEN_RATIO = (5**0.5 - 1) / 2
_ROUNDS = 4  # make a strong pseudo-random permutation (Luby and Rackoff 1988)
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio

_UInt64Array = npt.NDArray[np.uint64]


class SampleOrder:
    """The source and the row of each sample. Rows are numbered source by source."""

    def __init__(self, weights: Sequence[float], rows_of_sources: Sequence[int], seed: int) -> None:
        self._num_rows = np.array(rows_of_sources)
        self._seed = seed
        self._counts = _divide(_SCHEDULE, weights)  # [sources], samples of each in the schedule
        owners = np.repeat(np.arange(len(weights)), self._counts)
        numbers = np.concatenate([np.arange(count) for count in self._counts])
        # Multiples of the golden ratio spread evenly over a period, however many there are.
        phases = (0.5 + np.arange(len(weights)) * _GOLDEN_RATIO) % 1
        order = np.argsort((numbers + phases[owners]) / self._counts[owners], kind="stable")
        self._sources, self._numbers = owners[order], numbers[order]  # [_SCHEDULE]

    def split(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the source of each sample, and its number among the samples of that source."""
        turns, places = np.divmod(samples, _SCHEDULE)
        sources = self._sources[places]
        return sources, turns * self._counts[sources] + self._numbers[places]

    def rows(self, first_sample: int, num_samples: int) -> Int64Array:
        """Return the rows of `num_samples` samples from `first_sample` on."""
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
        sources, numbers = self.split(samples)
        rows = (np.cumsum(self._num_rows) - self._num_rows)[sources]
        for source in np.unique(sources).tolist():
            mine = sources == source
            num_rows = int(self._num_rows[source])
            rows[mine] += sample_rows(numbers[mine], num_rows, self._seed, source)
        return rows

    def epochs(self, num_samples: int) -> list[float]:
        """Return how many epochs of each source the first `num_samples` samples make."""
        turns, rest = divmod(num_samples, _SCHEDULE)
        in_turn = np.bincount(self._sources[:rest], minlength=len(self._counts))
        epochs: list[float] = ((turns * self._counts + in_turn) / self._num_rows).tolist()
        return epochs


def _divide(total: int, weights: Sequence[float]) -> Int64Array:
    """Divide a total by weights, at least 1 each; the largest remainders are rounded up."""
    exact = np.array(weights, dtype=np.float64) * (total / sum(weights))
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: max(0, total - int(counts.sum()))]] += 1
    counts[np.argmax(counts)] -= counts.sum() - total  # where tiny weights were raised to 1
    return counts


def sample_rows(samples: Int64Array, num_rows: int, seed: int, source: int = 0) -> Int64Array:
    """Return the rows of samples of one source, which has `num_rows` rows."""
    seed += source * _ODD  # each source of a mixture has its own order
    epochs, places = np.divmod(samples, num_rows)
    rows = np.empty_like(samples)
    for epoch in np.unique(epochs).tolist():
        in_epoch = epochs == epoch
        rows[in_epoch] = permute(places[in_epoch], num_rows, seed, epoch)
    return rows


def permute(places: Int64Array, size: int, seed: int, epoch: int) -> Int64Array:
    """Return where a pseudo-random permutation of [0, size) sends each of the places.

    A Feistel network permutes [0, 4^k), the smallest such range that holds `size`. Values outside
    [0, size) go through it again until they are inside (cycle walking).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    key = _mix(np.array([seed % (1 << 64)], dtype=np.uint64)) ^ np.uint64(epoch)
    keys = _mix(_mix(key) ^ np.arange(_ROUNDS, dtype=np.uint64))
    values = _feistel(places.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: _UInt64Array, half_bits: int, keys: _UInt64Array) -> _UInt64Array:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: _UInt64Array) -> _UInt64Array:
    """Apply one step of splitmix64 (Steele, Lea and Flood 2014): counter and finaliser."""
    values = values + np.uint64(_ODD)  # wraps around, as intended
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
