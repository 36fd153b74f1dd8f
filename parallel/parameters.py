"""Parameters, the facts about them that layers declare, and which slice of each weight a rank has.

[Note: parameters]
A parameter is a plain float32 tensor: this rank's tp shard of one weight, or of several that share
a matmul, stacked by rows. Layers cast it to the dtype of their input, unless FSDP2 has. Facts that
a plain tensor cannot hold are declared where the parameter is created, and kept on its module
because FSDP2 replaces the parameter object. Checkpoints, clipping and initialisation see weights,
not parameters: `local_shards` gives this rank's part of each weight and its place in the whole.

[Note: partial gradients]
With sequence parallelism a tp rank sees s/t of the positions. A replicated weight used there (a
norm, a row-parallel bias, a position table) gets a gradient summed over those positions only; the
true gradient is the sum over tp. The gradient of a tp-sharded weight is always complete.

[Note: sharding]
A weight is sharded over tp by rows, by columns or not at all. FSDP2 shards each parameter over dp
by rows. Shards are those of torch.chunk: ceil(size / parts) rows each, the last ones fewer. Nothing
is padded: a vocabulary of 603 rows over two ranks is 302 + 301.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.weights import Weights, WeightSpec
from parallel.mesh import Mesh
from parallel.randomness import fold_seed

Slices = tuple[slice, ...]


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and end of shard `index` of `size` rows split into `parts`."""
    chunk = -(-size // parts)
    return min(index * chunk, size), min((index + 1) * chunk, size)


def tp_slices(spec: WeightSpec, tp_size: int, tp_rank: int) -> Slices:
    """The part of a weight that a tp rank has."""
    slices = [slice(0, size) for size in spec.shape]
    if (tp_dim := spec.tp_dim_at(tp_size)) is not None:
        slices[tp_dim] = slice(*shard_range(spec.shape[tp_dim], tp_size, tp_rank))
    return tuple(slices)


def dp_slices(of_tp_rank: Sequence[Slices], dp_size: int, dp_rank: int) -> list[Slices]:
    """The slice of each weight that one dp rank has, given the slices of its tp rank."""
    num_rows = sum(rows.stop - rows.start for rows, *_ in of_tp_rank)
    first, end = shard_range(num_rows, dp_size, dp_rank)  # relative to the first row of a weight
    parts = []
    for rows, *others in of_tp_rank:
        size, start = rows.stop - rows.start, max(0, first)
        stop = max(start, min(size, end))
        parts.append((slice(rows.start + start, rows.start + stop), *others))
        first, end = first - size, end - size
    return parts


@dataclass(frozen=True)
class Declared:
    """What a layer declares about one weight in a parameter."""

    spec: WeightSpec
    slices: Slices  # this tp rank's part of the whole; of a LocalShard, this rank's
    grad_is_partial: bool  # over the tp axis, see [Note: partial gradients]
    is_tied: bool  # held by the first and the last stage, with a part of its gradient each
    mesh: Mesh

    @property
    def tp_dim(self) -> int | None:
        """The dim sharded over tp; None: every tp rank has the same."""
        return self.spec.tp_dim_at(self.mesh.tp.size)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return self.spec.shape


@dataclass(frozen=True)
class LocalShard(Declared):
    """This rank's part of a weight, or of its gradient or moment, and its place in the whole."""

    tensor: Tensor  # shares the memory of the parameter, gradient or moment


def declare_parameter(
    module: nn.Module,
    name: str,
    weights: WeightSpec | Weights,
    mesh: Mesh,
    *,
    grad_is_partial: bool = False,
    is_tied: bool = False,
) -> None:
    """Register `module.name` on the meta device: it has no memory and no values yet.

    It holds one weight, or several with rows of equal shape; checkpoints store each by its name.
    """
    if isinstance(weights, WeightSpec):
        weights = {name: weights}
    declared, num_rows = {}, 0
    for weight_name, spec in weights.items():
        slices = tp_slices(spec, mesh.tp.size, mesh.tp.rank)
        # If all ranks hold a weight but each uses some rows, each has the gradient of those only.
        is_partial = grad_is_partial or spec.tp_dim_at(mesh.tp.size) != spec.tp_dim
        declared[weight_name] = Declared(spec, slices, is_partial, is_tied, mesh)
        num_rows += slices[0].stop - slices[0].start
    row_shape = [part.stop - part.start for part in slices[1:]]
    empty = torch.empty(num_rows, *row_shape, dtype=torch.float32, device="meta")
    module.register_parameter(name, nn.Parameter(empty))
    module.__dict__.setdefault("declared", {})[name] = declared


def declarations(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Parameter, dict[str, Declared]]]:
    """The prefix of the names, the parameter and its weights, for each parameter of a model."""
    for path, module in model.named_modules():
        for name, declared in module.__dict__.get("declared", {}).items():
            yield f"{path}." if path else "", getattr(module, name), declared


@torch.no_grad()
def local_shards(
    model: nn.Module, of: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter
) -> dict[str, LocalShard]:
    """This rank's part of every weight of a model, by name.

    `of` maps a parameter to a tensor of its layout, such as its gradient, or to None to leave it
    out. On several dp ranks the parameters must not be gathered at the moment.
    """
    shards = {}
    for prefix, parameter, declared in declarations(model):
        if (whole := of(parameter)) is None:
            continue
        parts = [one.slices for one in declared.values()]
        if isinstance(whole, DTensor):  # FSDP2 has sharded its rows over dp
            axis, whole = whole.device_mesh, whole.to_local()
            dim = axis.ndim - 1  # with HSDP the first dim is that of the replicas
            parts = dp_slices(parts, axis.size(dim), axis.get_local_rank(dim))
        tensor, row = whole.detach(), 0
        for (name, one), slices in zip(declared.items(), parts, strict=True):
            stop = row + slices[0].stop - slices[0].start
            part = tensor if len(declared) == 1 else tensor[row:stop]
            facts = vars(one) | {"slices": slices}
            shards[prefix + name] = LocalShard(**facts, tensor=part)
            row = stop
    return shards


@torch.no_grad()
def initialise_parameters(model: nn.Module, seed: int, mesh: Mesh) -> None:
    """Set initial values, a function of the seed and the weight's name on every layout.

    A weight is drawn in full on the CPU, then sliced; only one full weight is in memory at a time.
    Raises RuntimeError if a layer was created for another mesh.
    """
    for prefix, _, declared in declarations(model):
        for name, one in declared.items():
            if (of_layer := one.mesh) is not mesh:
                raise RuntimeError(
                    f"{prefix}{name} was created with tp={of_layer.tp.size}, sequence_parallel="
                    f"{of_layer.sequence_parallel}, but the model has tp={mesh.tp.size}, "
                    f"sequence_parallel={mesh.sequence_parallel}; give all layers the same mesh"
                )
    for name, shard in local_shards(model).items():
        spec = shard.spec
        if spec.init_std == 0.0:
            shard.tensor.fill_(spec.init_mean)
            continue
        generator = torch.Generator().manual_seed(fold_seed(seed, name))
        full = torch.empty(spec.shape, dtype=torch.float32)
        full.normal_(spec.init_mean, spec.init_std, generator=generator)
        shard.tensor.copy_(full[shard.slices])
