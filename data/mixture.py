"""Several sources as one: their tokens and rows end to end, and the order in which rows come.

Which source sample i of a run is from, and which of that source's samples it is, depend on the
weights alone: a schedule of 2^16 samples in which each source's are spread evenly, over and over.
Sources begin at different points of their periods, so that many small ones do not come together.
Inside a source, samples are rows in the order of `data/sampler.py`, epoch after epoch of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.packing import Int64Array
from data.rows import Rows, Spans
from data.sampler import sample_rows
from data.token_file import Tokens

_SCHEDULE = 1 << 16  # samples; a weight counts to within 2^-16 of their sum
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class JoinedTokens:
    """The token files of one split of all sources, end to end."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(part.num_tokens for part in parts)])  # [parts + 1]
        self.num_tokens = int(self.starts[-1])
        offsets = [
            part.document_offsets[:-1] + start
            for part, start in zip(parts, self.starts[:-1], strict=True)
        ]
        self.document_offsets: Int64Array = np.concatenate([*offsets, self.starts[-1:]])
        self.document_bytes: Int64Array = np.concatenate([part.document_bytes for part in parts])

    def span(self, start: int, stop: int) -> npt.NDArray[np.unsignedinteger]:
        """Returns the tokens of a span inside one source."""
        part = int(np.searchsorted(self.starts, start, side="right")) - 1
        assert stop <= self.starts[part + 1], "a row lies inside one source"
        return self.parts[part].span(start - int(self.starts[part]), stop - int(self.starts[part]))

    @property
    def num_documents(self) -> int:
        """Documents of all sources."""
        return len(self.document_bytes)


class JoinedRows:
    """The rows of all sources, numbered through; each lies in one of them."""

    def __init__(self, parts: Sequence[Rows], num_tokens: Sequence[int]) -> None:
        self._parts = tuple(parts)
        self._first_rows = np.cumsum([0, *map(len, parts)])
        self._first_tokens = np.cumsum([0, *num_tokens])

    @property
    def rows_of_sources(self) -> list[int]:
        """How many rows each source has."""
        return [len(part) for part in self._parts]

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def spans(self, rows: Int64Array) -> Spans:
        """Returns the spans of rows given by number, in the tokens of all sources end to end."""
        none = np.empty(0, dtype=np.int64)
        found = [(none, none, none, none)]  # so that no rows give no spans
        for source, places, numbers in self._by_source(rows):
            spans = self._parts[source].spans(numbers)
            starts = spans.starts + self._first_tokens[source]
            found.append((starts, spans.lengths, places[spans.rows], spans.columns))
        return Spans(*map(np.concatenate, zip(*found, strict=True)))

    def lengths(self, rows: Int64Array) -> Int64Array:
        """Returns the inputs of rows given by number."""
        lengths = np.empty(len(rows), dtype=np.int64)
        for source, places, numbers in self._by_source(rows):
            lengths[places] = self._parts[source].lengths(numbers)
        return lengths

    def _by_source(self, rows: Int64Array) -> Iterator[tuple[int, Int64Array, Int64Array]]:
        """Yields (source, places in `rows`, numbers in the source) for each source that has any."""
        sources = np.searchsorted(self._first_rows, rows, side="right") - 1
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            yield source, places, rows[places] - self._first_rows[source]


@dataclass(frozen=True)
class Schedule:
    """From the number of a sample of the run to its source, and its number among that source's."""

    sources: Int64Array  # [_SCHEDULE]
    numbers: Int64Array  # [_SCHEDULE], of each sample among those of its source
    counts: Int64Array  # [number of sources], samples of each in the schedule

    def split(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Returns (source, number among the source's samples) of samples of the run."""
        turns, places = np.divmod(samples, len(self.sources))
        sources = self.sources[places]
        return sources, turns * self.counts[sources] + self.numbers[places]

    def samples_of(self, num_samples: int) -> list[int]:
        """How many of the run's first samples are from each source."""
        turns, place = divmod(num_samples, len(self.sources))
        in_turn = np.bincount(self.sources[:place], minlength=len(self.counts))
        counts: list[int] = (turns * self.counts + in_turn).tolist()
        return counts


def make_schedule(weights: Sequence[float]) -> Schedule:
    """Spreads the samples of each source evenly over a schedule; each gets one at least."""
    if len(weights) == 1:
        return Schedule(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64))
    counts = _shares(weights, _SCHEDULE)
    numbers = np.concatenate([np.arange(n) for n in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    # Multiples of the golden ratio are spread evenly over a period, however many there are.
    phases = (0.5 + np.arange(len(counts)) * _GOLDEN_RATIO) % 1
    order = np.argsort((numbers + phases[owners]) / counts[owners], kind="stable")
    return Schedule(owners[order], numbers[order], counts)


def _shares(weights: Sequence[float], total: int) -> Int64Array:
    """Divides a total by weights, each at least 1, those with the largest remainders rounded up."""
    exact = np.array(weights, dtype=np.float64) * (total / sum(weights))
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    for place in np.argsort(counts - exact, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[place] += 1
    counts[np.argmax(counts)] -= counts.sum() - total  # where tiny weights were lifted to 1
    return counts


class SampleOrder:
    """The rows of a run's samples; the rows of all sources are numbered through."""

    def __init__(self, weights: Sequence[float], rows_of_sources: Sequence[int], seed: int) -> None:
        self._schedule = make_schedule(weights)
        self._num_rows = list(rows_of_sources)
        self._first_rows = np.cumsum([0, *rows_of_sources])
        self._seed = seed

    def rows(self, first_sample: int, num_samples: int) -> Int64Array:
        """Returns the rows of samples first_sample .. first_sample + num_samples - 1."""
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
        sources, numbers = self._schedule.split(samples)
        rows = np.empty_like(samples)
        for source in np.unique(sources):
            mine = sources == source
            order = sample_rows(numbers[mine], self._num_rows[source], self._seed, int(source))
            rows[mine] = self._first_rows[source] + order
        return rows

    def epochs(self, num_samples: int) -> list[float]:
        """How often each source has been gone through after so many samples."""
        counts = self._schedule.samples_of(num_samples)
        return [count / rows for count, rows in zip(counts, self._num_rows, strict=True)]
