"""What memory the tensors of a piece of work take, written down as it is taken and given back.

A dispatch mode sees every operation, in forward and in backward, and what it returns. A piece is
the memory behind a tensor and all views of it. Only pretended tensors (torch's fake ones) are
looked at, so nothing is really taken. What a kernel takes for itself and gives back is not seen.
"""

import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor, _sharding_prop
from torch.utils._python_dispatch import TorchDispatchMode


class Piece:
    """The memory of a tensor and of its views."""

    def __init__(self, number: int, taken_at: int, tensor: Tensor, place: str) -> None:
        self.number = number  # in the order in which pieces were taken
        self.taken_at = taken_at  # an instant of the log
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)  # of its first tensor
        self.place = place  # where the program was
        self.num_bytes = 0  # now
        self.was_emptied = False  # given back while tensors still use it, as FSDP2 does


class MemoryLog(TorchDispatchMode):
    """A log of pieces; instants are positions in it."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.places = [""]  # kept by whoever knows where the program is; the innermost one last
        self.pieces: list[Piece] = []
        self.changes: list[tuple[int, int]] = []  # (piece, bytes taken), in order
        self._known: dict[int, tuple[weakref.ref[UntypedStorage], Piece]] = {}  # by address
        # Who makes an empty tensor may empty and fill it without an operation that could be seen.
        self._may_be_emptied: dict[int, tuple[weakref.ref[UntypedStorage], Piece]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(of_argument, DTensor) for of_argument in types):
            return NotImplemented  # it becomes operations on plain tensors, which come here again
        self._see_emptied()
        for tensor in self._ours((args, list((kwargs or {}).values()))):
            self._see_filled(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in self._ours(result):
            self._see(tensor, func is torch.ops.aten.empty.memory_format)
        return result

    @property
    def now(self) -> int:
        """The present instant."""
        self._see_emptied()
        return len(self.changes)

    def piece_of(self, tensor: Tensor) -> Piece:
        """The piece behind a tensor."""
        return self._known[tensor.untyped_storage()._cdata][1]

    def live(self, instant: int) -> dict[Piece, int]:
        """The pieces that there were at an instant, with their bytes."""
        sizes: dict[int, int] = {}
        for number, change in itertools.islice(self.changes, instant):
            sizes[number] = sizes.get(number, 0) + change
        return {self.pieces[number]: size for number, size in sizes.items() if size}

    def peak(self) -> int:
        """The instant at which there was most."""
        totals = [0, *itertools.accumulate(change for _, change in self.changes)]
        return max(range(len(totals)), key=totals.__getitem__)

    def _ours(self, value: Any) -> Iterator[Tensor]:
        """The pretended tensors of an argument or result that is one, or has lists of them."""
        if isinstance(value, FakeTensor):
            if value.fake_mode is self.fake:
                yield value
        elif isinstance(value, list | tuple):
            for part in value:
                yield from self._ours(part)

    def _see(self, tensor: Tensor, made_empty: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known or _is_sharding_rule():
            return
        piece = Piece(len(self.pieces), len(self.changes), tensor, self.places[-1])
        self.pieces.append(piece)

        def forget(_: weakref.ref[UntypedStorage]) -> None:
            del self._known[address]
            self._may_be_emptied.pop(address, None)
            self._resize(piece, 0)

        entry = weakref.ref(storage, forget), piece
        self._known[address] = entry
        if made_empty:
            self._may_be_emptied[address] = entry
        self._resize(piece, storage.nbytes())

    def _see_filled(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        entry = self._known.get(storage._cdata)
        if entry is not None and entry[1].was_emptied and storage.nbytes():
            self._may_be_emptied[storage._cdata] = entry
            self._resize(entry[1], storage.nbytes())

    def _see_emptied(self) -> None:
        for address, (reference, piece) in list(self._may_be_emptied.items()):
            storage = reference()
            if storage is not None and storage.nbytes() == 0:
                del self._may_be_emptied[address]
                piece.was_emptied = True
                self._resize(piece, 0)

    def _resize(self, piece: Piece, num_bytes: int) -> None:
        if num_bytes != piece.num_bytes:
            self.changes.append((piece.number, num_bytes - piece.num_bytes))
            piece.num_bytes = num_bytes


def _is_sharding_rule() -> bool:
    """Whether DTensor is at work on shapes, for which it makes global tensors without contents."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == _sharding_prop.__name__:
            return True
    return False
