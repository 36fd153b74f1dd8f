"""Randomness as a pure function: nothing depends on the layout or on earlier draws.

A dropout mask is a function of (seed, step, layer, site, global sample index, global position,
channel). The loader hashes the first five into keys, the device adds the rest (ops/dropout.py).
"""

import math
from dataclasses import dataclass, replace

import xxhash
from torch import Tensor

from ops.balance import balanced_positions
from ops.dropout import (
    hashed_dropout_add,
    keep_masks,
    mask_counters,
    prepare_keys,
    site_index,
)
from parallel.mappings import sequence_shard
from parallel.mesh import Mesh

# If all masks of a micro-batch have at most this many elements (a byte each), they are computed
# together and kept for backward, because a small model waits for the host and not for arithmetic.
STORED_ELEMENTS = 2**22


def fold_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed that depends on `seed` and all of `parts`."""
    text = "/".join([str(seed), *(str(part) for part in parts)])
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


@dataclass(frozen=True)
class DropoutStream:
    """Identifies the dropout masks of one micro-batch."""

    seed: int
    step: int
    first_sample: int  # counted over the whole run and all ranks
    keys: Tensor | None  # `dropout_keys` of the samples, on the device; None: no hidden dropout
    # Of `prepare_masks`: positions `[s/t]` or their `mask_counters`, and all masks
    # `[1 + 2 L, s/t, b, h]` if they are small.
    rows: Tensor | None = None
    masks: Tensor | None = None

    def attention_seed(self, layer: int, tp_rank: int) -> int:
        """The seed of attention dropout, the only randomness that depends on the layout."""
        return fold_seed(self.seed, "attention", self.step, layer, self.first_sample, tp_rank)


def prepare_masks(
    stream: DropoutStream, shape: tuple[int, ...], rate: float, mesh: Mesh
) -> DropoutStream:
    """Compute once what all masks of activations `[s/(c t), b, h]` on this rank share."""
    if stream.keys is None or rate == 0.0:
        return stream
    keys, rows = _keys_and_rows(stream.keys, shape, mesh)
    are_few = len(keys) * math.prod(shape) <= STORED_ELEMENTS
    stores = are_few and mesh.pp.size == 1  # a stage would compute those of all stages
    masks = keep_masks(rows, keys, shape[2], rate) if stores else None
    return replace(stream, keys=keys, rows=rows, masks=masks)


def _keys_and_rows(keys: Tensor, shape: tuple[int, ...], mesh: Mesh) -> tuple[Tensor, Tensor]:
    num_local = shape[0] * mesh.tp.size if mesh.sequence_parallel else shape[0]
    local = balanced_positions(num_local * mesh.cp.size, mesh.cp.rank, mesh.cp.size, keys.device)
    rows = sequence_shard(local.int(), mesh)
    return prepare_keys(keys), rows if mesh.compile else mask_counters(rows, shape[2])


def dropout_add(
    x: Tensor,
    residual: Tensor | None,
    rate: float,
    stream: DropoutStream | None,
    layer: int,
    site: int,
    mesh: Mesh,
) -> Tensor:
    """`residual + dropout(x)` for `[s/t, b, h]`; a `stream` of None or a rate of 0: no dropout."""
    if stream is None or rate == 0.0:
        return x if residual is None else x + residual
    assert stream.keys is not None, "hidden dropout needs dropout_keys"
    index = site_index(layer, site)
    if stream.masks is not None:
        return hashed_dropout_add(x, residual, rate, stream.masks[index], None, False)
    keys, rows = stream.keys, stream.rows
    if rows is None:
        keys, rows = _keys_and_rows(keys, x.shape, mesh)
    return hashed_dropout_add(x, residual, rate, keys[index], rows, mesh.compile)
