"""Bytes that autograd saves for backward in one layer of one rank, over s b h.

A hook sees every saved tensor. Each storage counts once however many views of it are saved, and
weights do not count. The embedding, the head and the loss save the same in models of one and of two
layers, so the difference is exactly one layer. Each model first runs a forward and a backward, so
that everything compiled or cached at first use exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from bench.workload import Workload
from ops.torch_private import storage_id

_COPIES = ("ToCopy", "Cat", "Select", "Slice", "T", "Transpose", "View")

MakeForward = Callable[[int], tuple[nn.Module, Callable[[], Tensor]]]


def saved_per_layer(make: MakeForward, workload: Workload) -> dict[str, Any]:
    """Measure one layer; `make` builds a model of n layers and a forward that returns its loss.

    Returns the bytes of a layer, and those over s b h of the whole micro-batch (Korthikanti et al.
    2022, table 2: 34 + 5 a s / h at t = 1, in 16 bits with dropout).
    """
    one, two = (_saved_bytes(*make(num_layers)) for num_layers in (1, 2))
    sbh = workload.seq_length * workload.micro_batch * workload.hidden_size
    return {"layer_bytes": two - one, "bytes_per_sbh": (two - one) / sbh}


def _saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    forward().backward()
    # By the storage itself, not its address: FSDP2 frees the memory of gathered weights after their
    # use, and an activation may get it. The tensors are kept, so that no storage is given up.
    weights: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}

    def note_weights(module: nn.Module, _: Any) -> None:
        # In the forward, where FSDP2 provides its gathered copies.
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            weights[_storage(tensor)] = tensor

    def pack(tensor: Tensor) -> Tensor:
        if not _is_copy_of_weight(tensor):
            kept[_storage(tensor)] = tensor
        return tensor

    hook = register_module_forward_pre_hook(note_weights)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    hook.remove()
    weights |= {_storage(parameter): parameter for parameter in model.parameters()}
    total = sum(
        _local(tensor).untyped_storage().nbytes()
        for storage, tensor in kept.items()
        if storage not in weights
    )
    loss.backward()
    return total


def _is_copy_of_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter that was cast for this forward, or a view of that."""
    node = tensor.grad_fn
    while node is not None and node.name().removesuffix("Backward0") in _COPIES:
        node = node.next_functions[0][0]
    return hasattr(node, "variable")  # of a leaf


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _storage(tensor: Tensor) -> int:
    """Identify the storage of a tensor."""
    return storage_id(_local(tensor))
