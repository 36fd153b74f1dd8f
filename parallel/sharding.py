"""Which part of a tensor a rank owns: the one table that weights, gradients and checkpoints read.

A tensor is cut first along the tensor-parallel axis (by rows, by columns, or not at all), and what
a tp rank has is then cut by rows along the data-parallel axis. Cuts are torch.chunk's: pieces of
ceil(size / parts) rows, of which the last may be shorter. So a vocabulary of 603 rows over two
ranks is 302 + 301, and no row is ever padded.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.mesh import Axis, Mesh


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """First row of piece `index`, and one past its last, when `size` rows are cut into `parts`."""
    chunk = -(-size // parts)
    return min(index * chunk, size), min((index + 1) * chunk, size)


def local_slices(
    global_shape: Sequence[int], tp_dim: int | None, tp: Axis, dp: Axis
) -> tuple[slice, ...]:
    """The part of a tensor that a rank owns, as slices of the global tensor.

    `tp_dim` is the dim cut along the tp axis, None for a tensor replicated over it.
    """
    starts, stops = [0] * len(global_shape), list(global_shape)
    if tp_dim is not None:
        starts[tp_dim], stops[tp_dim] = shard_range(global_shape[tp_dim], tp.size, tp.rank)
    first, last = shard_range(stops[0] - starts[0], dp.size, dp.rank)
    starts[0], stops[0] = starts[0] + first, starts[0] + last
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


def tp_shard_dim(tensor: Tensor) -> int | None:
    """The dim along which a parameter is cut over the tp axis, None if it is replicated."""
    assert isinstance(tensor, DTensor), "parameters are made by declare_parameter"
    placement = tensor.placements[-1]  # tp is the last axis of the mesh
    return placement.dim if placement.is_shard() else None  # type: ignore[attr-defined]


def local_part(tensor: Tensor, mesh: Mesh) -> tuple[slice, ...]:
    """The part of a parameter that this rank has, as slices of the whole.

    Over dp it is cut only if FSDP2 has taken it: then it knows of both axes.
    """
    assert isinstance(tensor, DTensor), "parameters are made by declare_parameter"
    is_cut_over_dp = tensor.device_mesh.ndim > 1
    dp = mesh.dp if is_cut_over_dp else Axis(1, 0, mesh.dp.group)
    return local_slices(tensor.shape, tp_shard_dim(tensor), mesh.tp, dp)
