"""The grid of ranks: who this process is along the tensor-parallel and the data-parallel axis.

An axis is one direction of the grid. tp is the fastest one, so that the ranks that talk most are
neighbours on one node: rank = dp.rank * tp.size + tp.rank. One rank is a grid of one, not a special
case.
"""

import logging
import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ops.compile import compile_obstacle
from ops.matmul import use_full_precision
from parallel.transport.backend import cpu_backend
from parallel.transport.rendezvous import TIMEOUT_S, connect_store, join_attempt

logger = logging.getLogger("microtron")

_POLL_INTERVAL_S = 0.5


# Under which products of a parallel linear layer it sends: [Note: what hides under what].
Overlap = Literal["none", "backward", "both"]


@dataclass(frozen=True)
class Axis:
    """One direction of the grid: `size` ranks, of which this process is number `rank`."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This process's place in the grid, and the groups it talks to."""

    device_mesh: DeviceMesh  # axes ("dp", "tp")
    device: torch.device
    tp: Axis
    dp: Axis
    world: Axis
    local_rank: int
    # True only where there is a sequence to split, so that layers need not ask for the size too.
    sequence_parallel: bool
    overlap: Overlap = "none"
    compile: bool = False  # functions of single elements become one kernel each, see ops/compile.py
    attempt: str = ""  # the name that the ranks have agreed on, see rendezvous.py
    is_restart: bool = False  # whether the launcher has started these ranks after others failed


def init_mesh(
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
    overlap: Overlap = "none",
    compile: bool = False,
    share_memory: bool = False,
    timeout_s: float = 0.0,
    device: str = "auto",
) -> Mesh:
    """Join the process group that the launcher describes (or a group of one) and lay the grid.

    `device` is auto, cuda or cpu, and the ranks agree on the type. On GPUs they use NCCL, on CPUs
    gloo or, if enabled, shared memory between ranks of a host, and each rank gets an equal share of
    its host's CPUs for its threads. Raises DeviceError on all ranks if they cannot agree.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    # torchrun sets 1 where nobody has chosen, which would leave most of a machine idle.
    nobodys_choice = "1" if "RANK" in os.environ else None
    if os.environ.get("OMP_NUM_THREADS") in (None, nobodys_choice):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    use_full_precision()
    num_gpus = torch.cuda.device_count()
    gpu = local_rank % max(1, num_gpus)
    attempt, store, device_type, is_restart = join_attempt(device, num_gpus, gpu)
    torch_device = torch.device(device_type)
    if use_cuda := device_type == "cuda":
        torch_device = torch.device("cuda", gpu)
        if overlap != "none" and 1 < tensor_model_parallel_size == world_size:
            _queue_in_order()
        torch.cuda.set_device(torch_device)
    backend = "nccl" if use_cuda else cpu_backend(share_memory)
    if store is not None:
        dist.init_process_group(
            backend,
            store=PrefixStore(f"{attempt}/collectives", store),
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            timeout=timedelta(seconds=max(timeout_s, TIMEOUT_S)),
            device_id=torch_device if use_cuda else None,
        )
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    compile = compile and _all_can_compile(torch_device)
    mesh = make_mesh(
        tensor_model_parallel_size, sequence_parallel, torch_device, local_rank, overlap, compile
    )
    return replace(mesh, attempt=attempt, is_restart=is_restart)


def _all_can_compile(device: torch.device) -> bool:
    """Whether every rank can: kernels round otherwise than torch, and copies must stay equal."""
    problem, rank = compile_obstacle(device), dist.get_rank()
    first = torch.tensor([dist.get_world_size() if problem is None else rank], device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if rank == first.item():
        logger.warning("train.compile has no effect, on any rank: rank %d: %s", rank, problem)
    return first.item() == dist.get_world_size()


def _queue_in_order() -> None:
    """Have a GPU begin kernels of all streams in the order in which they were launched.

    Then what is sent under a product begins before the product takes all of the GPU (Megatron-LM
    asks its users to set this). Read when CUDA starts. Not with FSDP2 over several ranks, whose own
    streams it would hold up, and not where somebody has chosen.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def wait_for_all_ranks(mesh: Mesh, where: str) -> None:
    """Return when all ranks have called this, however long one takes. `where` names the call."""
    if store := connect_store(mesh.attempt, f"meeting {where}"):
        store.add("arrived", 1)
        while store.add("arrived", 0) < mesh.world.size:
            time.sleep(_POLL_INTERVAL_S)


def make_mesh(
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
    device: torch.device,
    local_rank: int,
    overlap: Overlap = "none",
    compile: bool = False,
) -> Mesh:
    """Lay the ("dp", "tp") grid over the process group that exists.

    Raises RuntimeError if the number of ranks is no multiple of the tensor-parallel size.
    """
    world_size, tp_size = dist.get_world_size(), tensor_model_parallel_size
    if world_size % tp_size:
        raise RuntimeError(f"{world_size} ranks cannot be laid out in rows of tp={tp_size}")
    device_mesh = init_device_mesh(
        device.type, (world_size // tp_size, tp_size), mesh_dim_names=("dp", "tp")
    )

    def axis(name: str) -> Axis:
        group = device_mesh.get_group(name)
        return Axis(dist.get_world_size(group), dist.get_rank(group), group)

    everyone = dist.group.WORLD
    assert everyone is not None, "make_mesh needs a process group"
    world = Axis(world_size, dist.get_rank(), everyone)
    return Mesh(
        device_mesh=device_mesh,
        device=device,
        tp=axis("tp"),
        dp=axis("dp"),
        world=world,
        local_rank=local_rank,
        sequence_parallel=sequence_parallel and tp_size > 1,
        overlap=overlap,
        compile=compile,
    )


def close_mesh() -> None:
    """Leave the process group."""
    dist.destroy_process_group()
