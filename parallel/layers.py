"""Linear layers and the embedding, sharded over the tensor-parallel axis.

`s` positions, `b` sequences, `t` tp ranks. `[s/t, b, h]` is with sequence parallelism; without it,
read `[s, b, h]`. Sources: Shoeybi et al. 2019, section 3 (tensor parallelism); Korthikanti et al.
2022, section 4.2.2 (sequence parallelism).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from configs.weights import Weights, WeightSpec, select
from ops.matmul import linear, linear_fp32
from parallel.mappings import enter_tensor_parallel_region, exit_tensor_parallel_region
from parallel.mesh import Mesh
from parallel.overlap import WeightAndBias, column_parallel_linear, row_parallel_linear
from parallel.parameters import declare_parameter, shard_range


class _ColumnShard(nn.Module):
    """One weight and bias of a column-parallel layer; computes this rank's columns of Y.

    Sharded by rows, `[out/t, in]`. With fewer row groups than ranks, every rank holds all rows and
    t / groups ranks use the same group. The gradient of such a weight is partial over tp, because a
    rank only sees the gradient of the group it uses.
    """

    weight: DTensor
    bias: DTensor | None

    def __init__(self, weights: Weights, mesh: Mesh) -> None:
        super().__init__()
        self.row_group: tuple[int, int] | None = None  # first row and number of rows, if shared
        spec = weights["weight"]
        if spec.tp_dim_at(mesh.tp.size) is None:
            num_groups = spec.num_row_groups
            assert num_groups, "a column-parallel weight must be sharded by rows"
            assert mesh.tp.size % num_groups == 0, f"{num_groups} row groups, tp={mesh.tp.size}"
            rows = spec.shape[0] // num_groups
            self.row_group = (mesh.tp.rank * num_groups // mesh.tp.size * rows, rows)
        for name, spec in weights.items():
            # The bias sees every position, as the weight does: sharded, its gradient is complete.
            declare_parameter(self, name, spec, mesh, grad_is_partial=self.row_group is not None)
        if "bias" not in weights:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *self.local())

    def local(self) -> WeightAndBias:
        """The weight `[out/t, in]` and bias `[out/t]` that this rank computes with."""
        weight = self.weight.to_local()
        bias = None if self.bias is None else self.bias.to_local()
        if self.row_group is not None:
            weight = weight.narrow(0, *self.row_group)
            bias = None if bias is None else bias.narrow(0, *self.row_group)
        return weight, bias


class MergedColumnParallelLinear(nn.Module):
    """Y_w = X A_w^T + b_w for one or more weights A_w, each sharded by rows over tp.

        A = [A_1; ...; A_t]      Y = [Y_1 ... Y_t]      Y_i = X A_i^T + b_i

    Input `[s/t, b, in]`. Output: `[s, b, out/t]` for each weight, in the order of `weights`
    (`[s, b, out/groups]` if it has fewer row groups than ranks).
    Forward: all-gather of X (or nothing). Backward: reduce-scatter (or all-reduce) of dX; with
    overlap also another all-gather of X, of which only the shard is kept.
    The weights share one gather. Each is its own parameter, so that a shard is one contiguous
    slice and names do not depend on the layout.
    """

    def __init__(self, weights: Weights, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        for name in dict.fromkeys(name.partition(".")[0] for name in weights):
            self.add_module(name, _ColumnShard(select(weights, name), mesh))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.mesh.overlap != "none":
            weights = [shard.local() for shard in self.children()]  # type: ignore[operator]
            return column_parallel_linear(x, weights, self.mesh)
        x = enter_tensor_parallel_region(x, self.mesh)  # [s, b, in]
        return tuple(shard(x) for shard in self.children())  # each [s, b, out/t]


class RowParallelLinear(nn.Module):
    """Y = X A^T + b with A sharded by columns over tp, and X to match.

        A = [A_1 ... A_t]      X = [X_1 ... X_t]      Y = sum_i X_i A_i^T + b

    Input `[s, b, in/t]`. Output `[s/t, b, out]`.
    Forward: reduce-scatter (or all-reduce) of Y. Backward: all-gather of dY (or nothing).
    The bias is added after the sum; before it, it would be added t times. With sequence
    parallelism it sees only s/t positions, so its gradient is partial.
    """

    weight: DTensor
    bias: DTensor | None

    def __init__(self, weights: Weights, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        declare_parameter(self, "weight", weights["weight"], mesh)
        if bias := weights.get("bias"):
            declare_parameter(self, "bias", bias, mesh, grad_is_partial=mesh.sequence_parallel)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mesh.overlap != "none":
            y = row_parallel_linear(x, self.weight.to_local(), self.mesh)
        else:
            y = linear(x, self.weight.to_local())  # [s, b, out], a partial sum
            y = exit_tensor_parallel_region(y, self.mesh)  # [s/t, b, out]
        return y if self.bias is None else y + self.bias.to_local()


class _Lookup(torch.autograd.Function):
    """y = A[ids].     dA[i] = sum of dy over all ids equal to i, in float32 at least.

    torch sums in the dtype of dy. On a CPU in bfloat16 that loses several percent of a frequent
    token's gradient (measured: 7 % at 2,500 occurrences).
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = table.shape[0]
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        grad_table = torch.ops.aten.embedding_dense_backward(
            grad.to(accumulate), ids, ctx.num_rows, padding_idx=-1, scale_grad_by_freq=False
        )
        return grad_table.to(grad.dtype), None


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Look up rows of a table, `[rows, h]` and `[...]` to `[..., h]`; sums dA in float32."""
    return _Lookup.apply(table, ids)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table that is sharded by vocabulary over tp.

    Input: token ids `[s, b]`, the same on all tp ranks. Output `[s/t, b, h]`.
    A rank looks up its own ids and writes zeros for the others; the sum over tp is the lookup.
    Forward: reduce-scatter (or all-reduce). Backward: all-gather (or nothing).
    """

    weight: DTensor

    def __init__(self, weight: WeightSpec, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.first_id, self.end_id = shard_range(weight.shape[0], mesh.tp.size, mesh.tp.rank)
        declare_parameter(self, "weight", weight, mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.weight.to_local()
        if self.mesh.tp.size == 1:
            return lookup(table, tokens)
        elsewhere = (tokens < self.first_id) | (tokens >= self.end_id)
        rows = lookup(table, (tokens - self.first_id).masked_fill(elsewhere, 0))
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)  # [s, b, h]
        return exit_tensor_parallel_region(rows, self.mesh)  # [s/t, b, h]


def vocab_parallel_logits(
    x: Tensor, weight: Tensor, mesh: Mesh, positions: slice = slice(None)
) -> Tensor:
    """Compute logits over this rank's vocabulary shard, for all positions or some.

    `x` `[s/t, b, h]`, `weight` `[v/t, h]` (of the head or the tied embedding). Result `[s, b, v/t]`
    in float32 at least.
    Forward: all-gather of x (or nothing). Backward: reduce-scatter (or all-reduce).
    """
    return linear_fp32(enter_tensor_parallel_region(x, mesh)[positions], weight)
