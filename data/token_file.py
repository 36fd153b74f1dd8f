"""Tokenized documents on disk, memory-mapped so that the ranks of a host share one copy.

    <split>.tokens   uint16 or uint32, ids of all documents, end to end, each bos ... eos
    <split>.offsets  int64 [n + 1]: document i is tokens[offsets[i] : offsets[i + 1]]
    <split>.bytes    int64 [n]: UTF-8 bytes of the text of document i
    <split>.targets  int64 [2 m]: where targets begin and end in turn; only of pairs and
                     conversations (data/corpus/segments.py), and .bytes is then that of targets

The files are raw arrays; the header of their cache entry has their dtype and sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data.packing import Int64Array

PARTS = ("tokens", "offsets", "bytes")  # suffixes of the files of a split
TARGETS = "targets"  # suffix of a further file, if only some tokens are targets
INDEX_DTYPE = np.dtype("<i8")

TokenArray = npt.NDArray[np.unsignedinteger]


class Targets:
    """Which tokens of a stream are targets: those from each even bound to the next odd one."""

    def __init__(self, bounds: Int64Array) -> None:
        self.bounds = bounds  # [2 m], ascending
        self._sums = np.concatenate([[0], np.cumsum(bounds[1::2] - bounds[::2])])

    @property
    def num_targets(self) -> int:
        """Targets of the whole stream."""
        return int(self._sums[-1])

    def contains(self, places: Int64Array) -> npt.NDArray[np.bool_]:
        """Return whether each place in the stream has a target."""
        return np.searchsorted(self.bounds, places, side="right") % 2 == 1

    def count(self, starts: Int64Array, stops: Int64Array) -> Int64Array:
        """Return the number of targets from each start up to its stop, without reading tokens."""
        return self._before(stops) - self._before(starts)

    def _before(self, places: Int64Array) -> Int64Array:
        number = np.searchsorted(self.bounds, places, side="right")  # of bounds up to the place
        inside = number % 2 == 1
        found: Int64Array = self._sums[number // 2]
        found[inside] += places[inside] - self.bounds[number[inside] - 1]
        return found


@dataclass(frozen=True)
class TokenFile:
    """The documents of one split of one source."""

    tokens: TokenArray  # [num_tokens], memory-mapped
    document_offsets: Int64Array  # [n + 1]
    document_bytes: Int64Array  # [n], UTF-8 bytes of the text
    num_ids: int | None = None  # every id is below; None: not checked
    path: Path | None = None
    targets: Targets | None = None  # None: all tokens but bos

    def span(self, start: int, stop: int) -> TokenArray:
        """Return tokens start .. stop - 1. Raise UserError for an id beyond the tokenizer's.

        No tensor-parallel rank would find its embedding, so it would train as zeros.
        """
        tokens = self.tokens[start:stop]
        if self.num_ids is not None and (beyond := np.flatnonzero(tokens >= self.num_ids)).size:
            place = int(beyond[0])
            raise UserError(
                f"token {start + place} of {self.path} is {tokens[place]}, but the tokenizer has "
                f"ids up to {self.num_ids - 1}: the file is damaged; delete "
                f"{self.path and self.path.parent} to build it again"
            )
        return tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents in this file."""
        return len(self.document_bytes)

    @property
    def parts(self) -> "tuple[TokenFile, ...]":
        """The token file of each source: this one."""
        return (self,)


class JoinedTokens:
    """The token files of one split of all sources, end to end."""

    def __init__(self, parts: Sequence[TokenFile]) -> None:
        self.parts = tuple(parts)
        self._starts = np.cumsum([0, *(part.num_tokens for part in parts)])
        self.num_tokens = int(self._starts[-1])
        offsets = [p.document_offsets[:-1] + n for p, n in zip(parts, self._starts, strict=False)]
        self.document_offsets: Int64Array = np.concatenate([*offsets, self._starts[-1:]])
        self.document_bytes: Int64Array = np.concatenate([part.document_bytes for part in parts])
        self.num_documents = len(self.document_bytes)
        self.targets = None
        if any(part.targets is not None for part in parts):
            bounds = [target_bounds(p) + n for p, n in zip(parts, self._starts, strict=False)]
            self.targets = Targets(np.concatenate(bounds))

    def span(self, start: int, stop: int) -> TokenArray:
        """Return tokens start .. stop - 1, which belong to one source."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        assert stop <= self._starts[part + 1], "a row lies inside one source"
        first = int(self._starts[part])
        return self.parts[part].span(start - first, stop - first)


Tokens = TokenFile | JoinedTokens


def target_bounds(file: TokenFile) -> Int64Array:
    """Return where targets begin and end in turn; in a text they are all tokens but bos."""
    if file.targets is not None:
        return file.targets.bounds
    offsets = file.document_offsets
    return np.stack([np.minimum(offsets[:-1] + 1, offsets[1:]), offsets[1:]], axis=1).ravel()


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest dtype that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def open_token_file(directory: Path, split: str, vocab_size: int) -> TokenFile:
    """Map a split that `write_token_file` wrote."""
    path, offsets, num_bytes = (directory / f"{split}.{part}" for part in PARTS)
    tokens = _map_array(path, token_dtype(vocab_size))
    documents = _map_array(offsets, INDEX_DTYPE), _map_array(num_bytes, INDEX_DTYPE)
    bounds = directory / f"{split}.{TARGETS}"
    targets = Targets(_map_array(bounds, INDEX_DTYPE)) if bounds.exists() else None
    return TokenFile(tokens, *documents, vocab_size, path, targets)


def _map_array(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # An empty file cannot be mapped. Slices of a plain array are faster than those of a memmap.
    return (
        np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)
    )
