"""Functions of whole matrices that are sharded over tp, dp and cp.

A matrix is gathered on one rank of its pipeline stage, which alone computes the function, and the
result is scattered. So it is computed once, and in the same way on every layout. The matrices are
divided among the ranks of a stage by their cost. One all-to-all gathers all matrices and one
scatters all results. Both are over all ranks, and the ranks of other stages exchange nothing: so
stages need no groups of their own.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from configs.weights import WeightSpec
from parallel.collectives import all_to_all
from parallel.mesh import Mesh
from parallel.parameters import LocalShard, Slices, declarations, dp_slices, tp_slices


class WholeMatrices:
    """Assigns each weight with `num_matrices` to one rank of its stage, and exchanges the parts.

    `cost` of a weight is relative; the ranks get shares of about equal cost.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, cost: Callable[[WeightSpec], float]) -> None:
        self.mesh, tp_size, dp_size = mesh, mesh.tp.size, mesh.dp_cp.size
        self.num_ranks = tp_size * dp_size  # of this stage, tp fastest
        num_shards = dp_size // mesh.replicas.size
        self.rank = mesh.dp_cp.rank * tp_size + mesh.tp.rank
        self.specs: dict[str, WeightSpec] = {}
        parts: dict[str, list[Slices]] = {}  # of each rank
        for prefix, _, declared in declarations(model):
            specs = [one.spec for one in declared.values()]
            of_tp_ranks = [[tp_slices(spec, tp_size, r) for spec in specs] for r in range(tp_size)]
            of_ranks = [
                dp_slices(of, num_shards, r % num_shards)
                for r in range(dp_size)
                for of in of_tp_ranks
            ]
            for index, (name, one) in enumerate(declared.items()):
                if one.spec.num_matrices:
                    self.specs[prefix + name] = one.spec
                    parts[prefix + name] = [of_rank[index] for of_rank in of_ranks]
        costs = {name: cost(spec) for name, spec in self.specs.items()}
        names_of: list[list[str]] = [[] for _ in range(self.num_ranks)]  # by owner
        loads = [0.0] * self.num_ranks
        for name in sorted(costs, key=costs.__getitem__, reverse=True):  # the largest first
            owner = loads.index(min(loads))
            names_of[owner].append(name)
            loads[owner] += costs[name]
        self.parts, self.own = parts, names_of[self.rank]
        self.names = [name for names in names_of for name in names]  # in the order of their owners
        before = [0] * (mesh.pp.rank * self.num_ranks)  # for ranks of other stages
        after = [0] * (mesh.world.size - len(before) - self.num_ranks)
        sent = [sum(_size(parts[name][self.rank]) for name in names) for names in names_of]
        received = [sum(_size(parts[name][r]) for name in self.own) for r in range(self.num_ranks)]
        self._sent, self._received = before + sent + after, before + received + after

    def update(
        self,
        shards: Mapping[str, LocalShard],
        dtype: torch.dtype,
        function: Callable[[Tensor, WeightSpec], Tensor],
    ) -> None:
        """Replace every matrix by a function of it, in place; `shards` are this rank's parts.

        `function` gets a matrix rounded to `dtype`, in which it is sent, and returns one of
        the same shape and dtype. Every rank of the mesh must call this.
        """
        tensors = [shards[name].tensor for name in self.names]
        if self.num_ranks == 1:
            for name, tensor in zip(self.names, tensors, strict=True):
                tensor.copy_(function(tensor.to(dtype), self.specs[name]))
            return
        sent = tensors[0].new_empty(sum(self._sent), dtype=dtype)
        received = sent.new_empty(sum(self._received))
        flat_parts = sent.split([tensor.numel() for tensor in tensors])
        for flat, tensor in zip(flat_parts, tensors, strict=True):
            flat.view(tensor.shape).copy_(tensor)
        all_to_all(received, self._received, sent, self._sent, self.mesh.world)
        ranks = range(self.num_ranks)
        pieces = received.split([_size(self.parts[n][r]) for r in ranks for n in self.own])
        for index, name in enumerate(self.own):
            whole = sent.new_empty(self.specs[name].shape)
            # Of all ranks; copies over tp and replicas are equal.
            of_ranks = zip(self.parts[name], pieces[index :: len(self.own)], strict=True)
            of_whole = [(slices, piece.view_as(whole[slices])) for slices, piece in of_ranks]
            for slices, piece in of_whole:
                whole[slices] = piece
            whole = function(whole, self.specs[name])
            for slices, piece in of_whole:
                piece.copy_(whole[slices])
        all_to_all(sent, self._sent, received, self._received, self.mesh.world)
        for flat, tensor in zip(flat_parts, tensors, strict=True):
            tensor.copy_(flat.view(tensor.shape))


def _size(slices: Slices) -> int:
    return math.prod(part.stop - part.start for part in slices)
