"""A grid of ranks of which only this process exists, to see what it would send and hold.

Collectives of the other ranks never come: torch's "fake" backend returns at once and leaves what
was to be received as it was. So nothing computed here means anything; shapes, bytes and the order
of collectives do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it makes the backend

from parallel.mesh import Mesh, Overlap, close_mesh, lay_mesh
from parallel.products import own_scratch


@contextmanager
def pretend_mesh(
    num_ranks: int,
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
    overlap: Overlap = "none",
) -> Iterator[Mesh]:
    """The mesh of rank 0 of `num_ranks`, on processors, with nobody to talk to.

    Raises RuntimeError if this process has joined a group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process that has joined a group of ranks cannot pretend another one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        with own_scratch():  # tensors without contents must not stay behind in it
            yield lay_mesh(
                tensor_model_parallel_size, sequence_parallel, torch.device("cpu"), 0, overlap
            )
    finally:
        close_mesh()
