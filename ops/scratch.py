"""Reusable float32 memory for operands and products that live for one matmul.

Allocated normally, they fragment the heap: a saved tensor of half the size takes the place of a
freed one, which the next matmul then cannot use. Half of a step's memory was such holes. CPUs only.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, float32


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}


_scratch = _Scratch()


def take_scratch(use: str, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised contiguous float32 memory, valid until the next call with the same `use`."""
    size, memory = math.prod(shape), _scratch.memory
    if use not in memory or memory[use].numel() < size:
        memory.pop(use, None)  # free it before allocating the larger one
        memory[use] = like.new_empty(size, dtype=float32)
    return memory[use][:size].view(shape)


@contextmanager
def scratch_scope() -> Iterator[dict[str, Tensor]]:
    """Use separate scratch memory inside, freed at the end; yields its tensors by use."""
    outside, _scratch.memory = _scratch.memory, {}
    try:
        yield _scratch.memory
    finally:
        _scratch.memory = outside
