"""What backward makes again instead of keeping.

Autograd keeps the tensors that an operation's backward needs. Some of them cost little to make from
others that are kept anyway: the output of a norm or of an activation function, or a copy of a
tensor in another layout. Megatron-LM empties the storage of such an output after its use and fills
it again before backward reads it; here autograd is given the recipe to keep in the tensor's place.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def recompute_in_backward(
    output: Tensor, recipe: Callable[[], Tensor], when: bool = True
) -> AbstractContextManager[None]:
    """Operations inside that keep `output` for backward keep `recipe` in its place, if `when`.

    `recipe` must give the same values again, from tensors that it holds; it runs in backward,
    without autograd, once for each operation that kept `output`.
    """
    return _recompute_in_backward(output, recipe) if when else nullcontext()


@contextmanager
def _recompute_in_backward(output: Tensor, recipe: Callable[[], Tensor]) -> Iterator[None]:
    # torch asks the innermost hooks only. All other tensors go on to those around these, which may
    # be those of full recomputation.
    outer_pack, outer_unpack = _hooks_around()
    # Not the output itself: autograd keeps the hooks, and they would keep what they mention.
    memory, shape = _memory(output), output.shape

    def pack(tensor: Tensor) -> Any:
        if _memory(tensor) == memory and tensor.shape == shape:
            return _Recipe()
        return outer_pack(tensor)

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, _Recipe):
            return outer_unpack(kept)
        with torch.no_grad():
            return recipe()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def keep_now(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Keep tensors for backward, which gets them back from the result; drop that afterwards.

    `save_for_backward` keeps them when forward is done. A recomputation ends when the last tensor
    is kept, so one that is kept before its forward sends anything spares it from sending again.
    """
    pack, unpack = _hooks_around()
    kept = [pack(tensor) for tensor in tensors]
    return lambda: [unpack(one) for one in kept]


class _Recipe:
    """Stands where a tensor would be kept."""


def _hooks_around() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """The pack and unpack hooks that are in force; they do nothing where there are none."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks or ((lambda tensor: tensor), (lambda kept: kept))


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are views of the same memory; also asked of tensors without any."""
    return _memory(a) == _memory(b)


def _memory(tensor: Tensor) -> int:
    """Which piece of memory a tensor is a view of, while it is there."""
    return tensor.untyped_storage()._cdata
