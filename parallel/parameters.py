"""Parameters, the facts about them that layers declare, and which slice of each a rank holds.

[Note: parameters]
A parameter is a DTensor on the tp axis. FSDP2, clipping and checkpoints read its global shape and
its sharding; layers call `.to_local()` once and compute on plain tensors. The remaining facts are
kept on the module, because FSDP2 replaces the parameter object: the initial distribution, and
whether the gradient is partial over tp.

[Note: partial gradients]
With sequence parallelism a tp rank sees s/t of the positions. A replicated weight used there (a
norm, a row-parallel bias, a position table) gets a gradient summed over those positions only; the
true gradient is the sum over tp. The gradient of a tp-sharded weight is always complete.

[Note: sharding]
A weight is sharded over tp by rows, by columns or not at all, and each tp shard over dp by rows.
Shards are those of torch.chunk: ceil(size / parts) rows each, the last ones fewer. Nothing is
padded: a vocabulary of 603 rows over two ranks is 302 + 301.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from configs.weights import WeightSpec
from parallel.mesh import Axis, Mesh
from parallel.randomness import fold_seed


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and end of shard `index` of `size` rows split into `parts`."""
    chunk = -(-size // parts)
    return min(index * chunk, size), min((index + 1) * chunk, size)


def local_slices(
    global_shape: Sequence[int], tp_dim: int | None, tp: Axis, dp: Axis
) -> tuple[slice, ...]:
    """A rank's part of a tensor sharded over tp (along `tp_dim`) and dp, as slices of the whole."""
    starts, stops = [0] * len(global_shape), list(global_shape)
    if tp_dim is not None:
        starts[tp_dim], stops[tp_dim] = shard_range(global_shape[tp_dim], tp.size, tp.rank)
    first, last = shard_range(stops[0] - starts[0], dp.size, dp.rank)
    starts[0], stops[0] = starts[0] + first, starts[0] + last
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


def tp_shard_dim(tensor: Tensor) -> int | None:
    """The dim along which a parameter is sharded over tp, None if it is replicated."""
    assert isinstance(tensor, DTensor), "create parameters with declare_parameter"
    placement = tensor.placements[-1]  # tp is the last axis of the mesh
    return placement.dim if placement.is_shard() else None  # type: ignore[attr-defined]


def local_part(tensor: Tensor, mesh: Mesh) -> tuple[slice, ...]:
    """The part of a parameter that this rank holds; split over dp only if FSDP2 has wrapped it."""
    assert isinstance(tensor, DTensor), "create parameters with declare_parameter"
    dp = mesh.dp if tensor.device_mesh.ndim > 1 else Axis(1, 0, mesh.dp.group)
    return local_slices(tensor.shape, tp_shard_dim(tensor), mesh.tp, dp)


@dataclass(frozen=True)
class ParameterFacts:
    """What a parameter's DTensor cannot say."""

    spec: WeightSpec
    grad_is_partial: bool  # over the tp axis, see [Note: partial gradients]
    mesh: Mesh


def declare_parameter(
    module: nn.Module,
    name: str,
    spec: WeightSpec,
    mesh: Mesh,
    *,
    grad_is_partial: bool = False,
) -> None:
    """Register `module.name` on the meta device: it has no memory and no values yet."""
    local_shape, tp_dim = list(spec.shape), spec.tp_dim_at(mesh.tp.size)
    placement: Placement = Replicate()
    if tp_dim is not None:
        start, stop = shard_range(spec.shape[tp_dim], mesh.tp.size, mesh.tp.rank)
        local_shape[tp_dim] = stop - start
        placement = Shard(tp_dim)
    parameter = DTensor.from_local(
        torch.empty(local_shape, device="meta"),
        mesh.device_mesh["tp"],
        [placement],
        run_check=False,
        shape=torch.Size(spec.shape),
        stride=torch.empty(spec.shape, device="meta").stride(),
    )
    module.register_parameter(name, nn.Parameter(parameter))
    module.__dict__.setdefault("facts", {})[name] = ParameterFacts(spec, grad_is_partial, mesh)


def parameter_facts(model: nn.Module) -> dict[str, ParameterFacts]:
    """The facts of every parameter of a model, by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: facts
        for prefix, module in model.named_modules()
        for name, facts in module.__dict__.get("facts", {}).items()
    }


@torch.no_grad()
def initialise_parameters(model: nn.Module, seed: int, mesh: Mesh) -> None:
    """Set initial values, a function of the seed and the parameter's name on every layout.

    A tensor is drawn in full on the CPU, then sliced; only one full tensor is in memory at a time.
    Raises RuntimeError if a layer was created for another mesh, as layers cannot mix sequence
    parallelism on and off.
    """
    facts = parameter_facts(model)
    for name, parameter in model.named_parameters():
        spec, of_layer = facts[name].spec, facts[name].mesh
        if of_layer is not mesh:
            raise RuntimeError(
                f"{name} was created with tp={of_layer.tp.size}, sequence_parallel="
                f"{of_layer.sequence_parallel}, but the model has tp={mesh.tp.size}, "
                f"sequence_parallel={mesh.sequence_parallel}; give all layers the same mesh"
            )
        assert isinstance(parameter, DTensor), f"{name} was not created by declare_parameter"
        local = parameter.to_local()
        if spec.init_std == 0.0:
            local.fill_(spec.init_mean)
            continue
        generator = torch.Generator().manual_seed(fold_seed(seed, name))
        full = torch.empty(spec.shape, dtype=torch.float32)
        full.normal_(spec.init_mean, spec.init_std, generator=generator)
        mine = local_slices(spec.shape, tp_shard_dim(parameter), mesh.tp, mesh.dp)
        local.copy_(full[mine])
