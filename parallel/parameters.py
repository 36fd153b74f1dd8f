"""Parameters: what each one is, said once, where it is made.

[Note: parameters]
A parameter is a DTensor on the tp axis. The DTensor is a declaration (global shape, how it is cut)
for those who need the whole picture: FSDP2, gradient clipping, checkpoints. Layers take
`.to_local()` once and compute on plain tensors. What a DTensor cannot say is kept beside it on the
module that owns the parameter (FSDP2 replaces the parameter object itself): how it is initialised,
and whether its gradient is partial over the tp axis.

[Note: partial gradients]
With sequence parallelism a tp rank sees s/t of the positions. A replicated weight used there (a
norm weight, the bias after a reduce-scatter, a position table) therefore gets a gradient summed
over those positions only, and the true one is the sum over the tp axis. Sharded weights never need
this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.mesh import Mesh
from parallel.randomness import fold_seed
from parallel.sharding import local_slices, shard_range, tp_shard_dim


@dataclass(frozen=True)
class Normal:
    """Start from a normal distribution of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Start from one value."""

    value: float


@dataclass(frozen=True)
class ParameterFacts:
    """What a parameter's DTensor cannot say."""

    init: Normal | Constant
    grad_is_partial: bool  # over the tp axis, see [Note: partial gradients]
    mesh: Mesh


def declare_parameter(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    mesh: Mesh,
    *,
    init: Normal | Constant,
    tp_dim: int | None = None,
    grad_is_partial: bool = False,
) -> None:
    """Register `module.name`, cut along `tp_dim` over the tp axis (None: replicated).

    The values are unset until `initialise_parameters`, and no memory is taken (meta device), so
    that a model larger than a rank can be described before it is sharded.
    """
    local_shape = list(shape)
    placement: Placement = Replicate()
    if tp_dim is not None:
        start, stop = shard_range(shape[tp_dim], mesh.tp.size, mesh.tp.rank)
        local_shape[tp_dim] = stop - start
        placement = Shard(tp_dim)
    parameter = DTensor.from_local(
        torch.empty(local_shape, device="meta"),
        mesh.device_mesh["tp"],
        [placement],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(tuple(shape), device="meta").stride(),
    )
    module.register_parameter(name, nn.Parameter(parameter))
    module.__dict__.setdefault("facts", {})[name] = ParameterFacts(init, grad_is_partial, mesh)


def parameter_facts(model: nn.Module) -> dict[str, ParameterFacts]:
    """The facts of every parameter of a model, by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: facts
        for prefix, module in model.named_modules()
        for name, facts in module.__dict__.get("facts", {}).items()
    }


def _require_one_mesh(facts: dict[str, ParameterFacts], mesh: Mesh) -> None:
    """Whether there is sequence parallelism is a fact of the mesh, so that layers cannot mix it."""
    for name, fact in facts.items():
        if fact.mesh is not mesh:
            raise RuntimeError(
                f"{name} was made for a mesh with sequence_parallel={fact.mesh.sequence_parallel} "
                f"and tp={fact.mesh.tp.size}, the model has one with sequence_parallel="
                f"{mesh.sequence_parallel} and tp={mesh.tp.size}; give all layers the same mesh"
            )


@torch.no_grad()
def initialise_parameters(model: nn.Module, seed: int, mesh: Mesh) -> None:
    """Give every parameter its initial values: a function of the seed and the parameter's name.

    Each tensor is drawn in full on the CPU and the rank keeps its part, so the values do not depend
    on the layout or the device, and no more than one full tensor is in memory.

    Raises RuntimeError if a layer was made for another mesh than the model.
    """
    facts = parameter_facts(model)
    _require_one_mesh(facts, mesh)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} was not made by declare_parameter"
        local, init = parameter.to_local(), facts[name].init
        if isinstance(init, Constant):
            local.fill_(init.value)
            continue
        generator = torch.Generator().manual_seed(fold_seed(seed, name))
        full = torch.empty(parameter.shape, dtype=torch.float32)
        full.normal_(0.0, init.std, generator=generator)
        mine = local_slices(parameter.shape, tp_shard_dim(parameter), mesh.tp, mesh.dp)
        local.copy_(full[mine])
