"""A log of the allocations and frees of fake tensors.

A dispatch mode sees every operation, in forward and backward, and the tensors that it returns. It
does not see the scratch memory of kernels.
"""

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor

from ops.torch_dry_run import (
    CAST,
    ITEM,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    is_sharding_rule,
)
from ops.torch_private import storage_id

_COPIES = {CAST, torch.ops.aten.cat.default}


@dataclass(eq=False)
class Allocation:
    """The memory of a tensor and all its views."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    module: str  # in whose forward it was allocated
    begin: int  # instant of the log
    num_bytes: int = 0  # now
    is_weight: bool = False  # of a parameter
    is_message: bool = False  # from or to another stage of a pipeline
    was_resized: bool = False  # freed while still referenced: weights gathered by FSDP2
    source: "Allocation | None" = None  # it is a cast of it, or some of its rows

    @property
    def is_weight_copy(self) -> bool:
        """Whether it holds weights that were cast from a parameter or gathered by FSDP2."""
        of = self.source
        return self.was_resized or (of is not None and (of.is_weight or of.is_weight_copy))


class MemoryLog(TorchDispatchMode):
    """A log of allocations; an instant is a position in it. Values read from fake tensors are 0."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.modules = [""]  # the modules whose forward is running, innermost last
        self.changes: list[tuple[Allocation, int]] = []  # in bytes
        self._known: dict[int, tuple[weakref.ref[UntypedStorage], Allocation]] = {}  # by address
        # Storages made by torch.empty: no operation shows when one is freed and filled again.
        self._resizable: dict[int, tuple[weakref.ref[UntypedStorage], Allocation]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(of_argument, DTensor) for of_argument in types):
            return NotImplemented  # DTensor then calls operations on plain tensors, seen here
        if func is ITEM and self._is_fake(args[0]):
            return 0.0 if args[0].is_floating_point() else 0
        self._update_resized()
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if self._is_fake(tensor):
                self._add(tensor, func is torch.ops.aten.empty.memory_format)
                if func in _COPIES:
                    source = args[0][0] if func is torch.ops.aten.cat.default else args[0]
                    self.allocation_of(tensor).source = self.allocation_of(source)
        return result

    @property
    def now(self) -> int:
        """The present instant."""
        self._update_resized()
        return len(self.changes)

    def allocation_of(self, tensor: Tensor) -> Allocation:
        """Find the allocation behind a tensor."""
        return self._known[storage_id(tensor)][1]

    def live(self, instant: int) -> dict[Allocation, int]:
        """Return the allocations that exist at an instant, with their bytes."""
        sizes: Counter[Allocation] = Counter()
        for allocation, change in self.changes[:instant]:
            sizes[allocation] += change
        return {allocation: size for allocation, size in sizes.items() if size}

    def peak(self) -> int:
        """Return the instant at which most memory is allocated."""
        totals = [0, *itertools.accumulate(change for _, change in self.changes)]
        return max(range(len(totals)), key=totals.__getitem__)

    def _is_fake(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.fake_mode is self.fake

    def _add(self, tensor: Tensor, is_resizable: bool) -> None:
        storage, address = tensor.untyped_storage(), storage_id(tensor)
        if address in self._known or is_sharding_rule():
            return
        allocation = Allocation(
            tensor.dtype, tuple(tensor.shape), self.modules[-1], len(self.changes)
        )

        def free(_: weakref.ref[UntypedStorage]) -> None:
            del self._known[address]
            self._resizable.pop(address, None)
            self._resize(allocation, 0)

        entry = self._known[address] = weakref.ref(storage, free), allocation
        if is_resizable:
            self._resizable[address] = entry
        self._resize(allocation, storage.nbytes())

    def _update_resized(self) -> None:
        for reference, allocation in tuple(self._resizable.values()):
            storage = reference()
            if storage is not None and storage.nbytes() != allocation.num_bytes:
                allocation.was_resized = True
                self._resize(allocation, storage.nbytes())

    def _resize(self, allocation: Allocation, num_bytes: int) -> None:
        if num_bytes != allocation.num_bytes:
            self.changes.append((allocation, num_bytes - allocation.num_bytes))
            allocation.num_bytes = num_bytes
