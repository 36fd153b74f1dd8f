"""What backward makes again instead of keeping.

Autograd keeps the tensors that an operation's backward needs. Some of them cost little to make from
others that are kept anyway: the output of a norm or of an activation function, or a copy of a
tensor in another layout. Megatron-LM empties the storage of such an output after its use and fills
it again before backward reads it; here autograd is given the recipe to keep in the tensor's place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def made_again(output: Tensor, recipe: Callable[[], Tensor], when: bool = True) -> Iterator[None]:
    """Operations inside that keep `output` for backward keep `recipe` in its place, if `when`.

    `recipe` must give the same values again, from tensors that it holds; it runs in backward,
    without autograd, once for each operation that kept `output`.
    """
    if not when:
        yield
        return

    def pack(tensor: Tensor) -> Tensor | None:
        is_output = tensor.data_ptr() == output.data_ptr() and tensor.shape == output.shape
        return None if is_output else tensor

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return recipe()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
