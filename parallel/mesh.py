"""The mesh of ranks: this process's place along the pipeline, data, context and tensor axes.

tp is the fastest axis, so that the ranks that communicate most are neighbours on one node, and pp
the slowest: rank = ((pp.rank * dp.size + dp.rank) * cp.size + cp.rank) * tp.size + tp.rank. A
single rank is a mesh of size 1 along each axis, not a special case. FSDP2 shards over dp and cp
together, because a gradient is a sum over both. With HSDP (Zhao et al. 2023, section 3.2.2) it
shards within each of `replicas.size` groups of neighbouring dp ranks, and all groups hold the same.
"""

import logging
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from configs.launch import threads_per_rank
from ops.compile import compiler_problem
from ops.matmul import use_full_precision
from ops.sdpa import avoid_cudnn_attention
from parallel.transport.backend import cpu_backend
from parallel.transport.rendezvous import TIMEOUT_S, connect_store, join_attempt

logger = logging.getLogger("microtron")

_POLL_INTERVAL_S = 0.5

Overlap = Literal["none", "backward"]  # see [Note: overlap] in overlap.py
CPCommType = Literal["all_gather", "p2p"]  # see context.py


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: `size` ranks, of which this process is number `rank`."""

    size: int
    rank: int
    group: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """This process's place in the mesh, its groups, and how its layers use them."""

    device_mesh: DeviceMesh  # axes ("pp", "dp", "cp", "tp")
    fsdp_mesh: DeviceMesh  # the ranks of dp_cp; with HSDP as ("replicate", "shard")
    device: torch.device
    tp: Axis
    cp: Axis
    dp: Axis
    dp_cp: Axis  # dp and cp as one axis
    replicas: Axis  # the ranks that hold the same shards (HSDP); otherwise size 1
    world: Axis
    local_rank: int
    pp: Axis  # the stages of the pipeline; see pipeline.py
    tied: Axis  # the first and the last stage; size 1 on a stage between them
    # For activations and for gradients of each kind of link between stages: see `link_kind`.
    pipeline_groups: tuple[tuple[dist.ProcessGroup, dist.ProcessGroup], ...]
    num_chunks: int  # of the model, per stage; several in the interleaved schedule
    sequence_parallel: bool  # false if tp.size is 1, so that layers need not check the size
    overlap: Overlap = "none"
    cp_comm_type: CPCommType = "all_gather"
    compile: bool = False  # whether to compile pointwise functions, see ops/compile.py
    kernels: str = ""  # of a dry run: the type of device that it stands for
    attempt: str = ""  # the name of this launch that the ranks agreed on, see rendezvous.py
    is_restart: bool = False  # whether the launcher has restarted the ranks after a failure

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the head of the model, and so logits and losses."""
        return self.pp.rank == self.pp.size - 1


def init_mesh(
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
    overlap: Overlap = "none",
    compile: bool = False,
    share_memory: bool = False,
    timeout_s: float = 0.0,
    device: str = "auto",
    num_threads: int | None = None,
    **more: Any,
) -> Mesh:
    """Join the process group that the launcher describes (or a group of one) and create the mesh.

    `device` is auto, cuda or cpu; the ranks agree on one. GPUs use NCCL; CPUs use gloo or, if
    enabled, shared memory between ranks of a host. `num_threads`: see `threads_per_rank`; `more`:
    see `make_mesh`. Raises DeviceError on all ranks if they cannot agree.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(threads_per_rank(num_threads, os.environ))
    use_full_precision()
    avoid_cudnn_attention()
    if overlap != "none" and 1 < tensor_model_parallel_size == world_size:
        # Start kernels in launch order, so that a collective starts before the matmul that
        # hides it (Megatron-LM asks its users to set this). Read when CUDA starts, which is in
        # `join_attempt`. Not with FSDP2 over several ranks, because it would delay FSDP2's own
        # streams.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    num_gpus = torch.cuda.device_count()
    gpu = local_rank % max(1, num_gpus)
    attempt, store, device_type, is_restart = join_attempt(device, num_gpus, gpu)
    torch_device = torch.device(device_type)
    if use_cuda := device_type == "cuda":
        torch_device = torch.device("cuda", gpu)
        torch.cuda.set_device(torch_device)
    backend = "cpu:gloo,cuda:nccl" if use_cuda else cpu_backend(share_memory)
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
    return make_mesh(
        tensor_model_parallel_size,
        sequence_parallel,
        torch_device,
        local_rank,
        overlap=overlap,
        compile=compile and _all_can_compile(torch_device),
        attempt=attempt,
        is_restart=is_restart,
        **more,
    )


def _all_can_compile(device: torch.device) -> bool:
    """Whether every rank can compile; otherwise none may, as compiled code rounds differently."""
    problem, rank = compiler_problem(device), dist.get_rank()
    first = torch.tensor([dist.get_world_size() if problem is None else rank], device=device)
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if rank == first.item():
        logger.warning(
            "train.compile is off on all ranks: rank %d cannot compile: %s", rank, problem
        )
    return first.item() == dist.get_world_size()


def wait_for_all_ranks(mesh: Mesh, where: str) -> None:
    """Block until all ranks have called this, without a time limit. `where` names the call."""
    if store := connect_store(mesh.attempt, f"meeting {where}"):
        store.add("arrived", 1)
        while store.add("arrived", 0) < mesh.world.size:
            time.sleep(_POLL_INTERVAL_S)


def make_mesh(
    tensor_model_parallel_size: int,
    sequence_parallel: bool,
    device: torch.device,
    local_rank: int,
    pipeline_model_parallel_size: int = 1,
    num_chunks: int = 1,
    context_parallel_size: int = 1,
    data_parallel_replicate_size: int = 1,
    **settings: Any,
) -> Mesh:
    """Create the ("pp", "dp", "cp", "tp") mesh over the existing process group.

    `settings`: other fields of Mesh that have a default. Raises RuntimeError if the number of ranks
    is not divisible by the sizes of the other axes.
    """
    world_size, tp_size = dist.get_world_size(), tensor_model_parallel_size
    pp_size, cp_size = pipeline_model_parallel_size, context_parallel_size
    num_replicas = data_parallel_replicate_size
    if world_size % (pp_size * num_replicas * cp_size * tp_size):
        axes = {"pp": pp_size, "replicas": num_replicas, "cp": cp_size, "tp": tp_size}
        sizes = " x ".join(f"{n}={size}" for n, size in axes.items() if size > 1)
        raise RuntimeError(f"world size {world_size} is not divisible by {sizes}")
    shape = (pp_size, world_size // (pp_size * cp_size * tp_size), cp_size, tp_size)
    device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
    fsdp_mesh = device_mesh["dp"]
    # Of each stage and tp rank: the ranks of dp x cp, by replica.
    dp_cp_ranks = torch.arange(world_size).view(pp_size, num_replicas, -1, tp_size)
    dp_cp_ranks = dp_cp_ranks.permute(0, 3, 1, 2).flatten(0, 1)
    if cp_size > 1:
        group = _own_group(dp_cp_ranks.flatten(1).tolist())
        assert group is not None
        fsdp_mesh = DeviceMesh.from_group(group, device.type, mesh_dim_names=("dp_cp",))
    dp_cp = fsdp_mesh.get_group()
    if num_replicas > 1:
        groups = [dp_cp_ranks.transpose(1, 2), dp_cp_ranks]
        made = [_own_group(ranks.flatten(0, 1).tolist()) for ranks in groups]
        own = torch.tensor(dist.get_process_group_ranks(dp_cp)).view(num_replicas, -1)
        fsdp_mesh = DeviceMesh.from_group(
            [group for group in made if group is not None],
            device.type,
            own,
            mesh_dim_names=("replicate", "shard"),
        )

    def axis(group: dist.ProcessGroup | None) -> Axis:
        assert group is not None, "make_mesh needs a process group"
        return Axis(dist.get_world_size(group), dist.get_rank(group), group)

    pp = axis(device_mesh.get_group("pp"))
    tied, pipeline_groups = pp, [(pp.group, pp.group)] * (3 if num_chunks > 1 else 2)
    if pp_size > 1:
        pipelines = device_mesh.mesh.flatten(1).t().tolist()  # one rank of each stage
        pipeline_groups = [
            (_own_group(pipelines) or pp.group, _own_group(pipelines) or pp.group)
            for _ in pipeline_groups
        ]
        _connect_stages(pp, pipeline_groups, device)
        # The stages between get a group too, as torch names groups by how many a rank has.
        parts = [part for ranks in pipelines for part in ([ranks[0], ranks[-1]], ranks[1:-1])]
        tied = axis(_own_group([part for part in parts if part]))
        if 0 < pp.rank < pp.size - 1:
            tied = Axis(1, 0, pp.group)
    return Mesh(
        device_mesh=device_mesh,
        device=device,
        fsdp_mesh=fsdp_mesh,
        tp=axis(device_mesh.get_group("tp")),
        cp=axis(device_mesh.get_group("cp")),
        dp=axis(device_mesh.get_group("dp")),
        dp_cp=axis(dp_cp),
        replicas=axis(fsdp_mesh.get_group(0)) if num_replicas > 1 else Axis(1, 0, dp_cp),
        world=axis(dist.group.WORLD),
        pp=pp,
        tied=tied,
        pipeline_groups=tuple(pipeline_groups),
        num_chunks=num_chunks,
        local_rank=local_rank,
        sequence_parallel=sequence_parallel and tp_size > 1,
        **settings,
    )


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Create groups of ranks on all ranks; return this rank's, or None."""
    own, _ = dist.new_subgroups_by_enumeration(groups)
    return own


def link_kind(stage: int, num_stages: int) -> int:
    """The kind of the link from a stage to the next one; the two links of a stage differ.

    0 and 1 alternate between neighbours; 2 is from the last stage to the first.
    """
    return 2 if (stage + 1) % num_stages == 0 else stage % 2


def _connect_stages(
    pp: Axis, groups: list[tuple[dist.ProcessGroup, dist.ProcessGroup]], device: torch.device
) -> None:
    """Open each connection with a message, as NCCL's first message blocks both of its ranks.

    Otherwise two ranks could wait for each other during a schedule.
    """
    number = torch.zeros(1, device=device)
    before, after = (pp.rank - 1) % pp.size, (pp.rank + 1) % pp.size
    for kind, (activations, gradients) in enumerate(groups):
        if link_kind(pp.rank, pp.size) == kind:
            dist.send(number, group=activations, group_dst=after)
            dist.recv(number, group=gradients, group_src=after)
        elif link_kind(before, pp.size) == kind:
            dist.recv(number, group=activations, group_src=before)
            dist.send(number, group=gradients, group_dst=before)


def close_mesh() -> None:
    """Leave the process group."""
    dist.destroy_process_group()
