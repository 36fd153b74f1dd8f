"""Selective recomputation: saved-tensor hooks that store how to recompute a tensor.

Autograd saves the tensors that backward needs. Some are cheap to recompute from others that are
saved anyway: the output of a norm or an activation, or a copy in another memory layout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ops.torch_private import current_saved_tensors_hooks, storage_id


@contextmanager
def recompute_in_backward(
    output: Tensor, recompute: Callable[[], Tensor], when: bool = True
) -> Iterator[None]:
    """Save `recompute` instead of `output` in operations inside, if `when`.

    `recompute` must return the same values, from tensors it holds. It runs in backward, without
    autograd, once for each operation that saved `output`.
    """
    if not when:
        yield
        return
    # torch runs only the innermost hooks, so ours call the outer ones (of full recomputation).
    outer_pack, outer_unpack = current_saved_tensors_hooks()
    # The closures live until backward, so they must not hold the output itself.
    storage, shape = storage_id(output), output.shape

    def pack(tensor: Tensor) -> Any:
        if storage_id(tensor) == storage and tensor.shape == shape:
            return _Recomputed()
        return outer_pack(tensor)

    def unpack(saved: Any) -> Tensor:
        if not isinstance(saved, _Recomputed):
            return outer_unpack(saved)
        with torch.no_grad():
            return recompute()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Recomputed:
    """Saved in place of a tensor that is recomputed."""


def save_early(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Save tensors for backward now; return a function that unpacks them and keeps them alive.

    `save_for_backward` saves when forward ends. Recomputation stops at the last saved tensor, so
    what a forward communicates after saving is not communicated again.
    """
    pack, unpack = current_saved_tensors_hooks()
    saved = [pack(tensor) for tensor in tensors]
    return lambda: [unpack(one) for one in saved]


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share storage; also works for fake and meta tensors."""
    return storage_id(a) == storage_id(b)
