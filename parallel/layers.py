"""Linear layers and the embedding, cut over the tensor-parallel axis.

Shapes: `s` positions, `b` sequences, `t` ranks on the tp axis. "`[s/t, b, h]`" is with sequence
parallelism; without it every rank has all `s`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ops.matmul import linear, linear_fp32
from parallel.mappings import enter_tensor_parallel_region, exit_tensor_parallel_region
from parallel.mesh import Mesh
from parallel.overlap import WeightAndBias, column_parallel_linear, row_parallel_linear
from parallel.parameters import Constant, Normal, declare_parameter
from parallel.sharding import shard_range


class _ColumnWeight(nn.Module):
    """One weight of a column-parallel layer and its bias; computes this rank's columns of Y.

    Cut by rows, `[out/t, in]`. Or, if its rows come in `num_row_groups` < t blocks that must stay
    whole, kept in full by every rank, of which t / num_row_groups compute the same block. The
    gradient of such a weight is partial: each rank only has the part of its own consumers.
    """

    weight: DTensor
    bias: DTensor | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        mesh: Mesh,
        init: Normal,
        *,
        has_bias: bool,
        num_row_groups: int | None,
    ) -> None:
        super().__init__()
        self.block: tuple[int, int] | None = None  # first row and number of rows, if kept in full
        if num_row_groups is not None and num_row_groups < mesh.tp.size:
            assert mesh.tp.size % num_row_groups == 0, (
                f"{num_row_groups} blocks over tp={mesh.tp.size}"
            )
            rows = out_size // num_row_groups
            self.block = (mesh.tp.rank * num_row_groups // mesh.tp.size * rows, rows)
        # The bias sees every position, like the weight: with rows of its own its gradient is whole.
        place: dict[str, Any] = {
            "tp_dim": None if self.block else 0,
            "grad_is_partial": self.block is not None,
        }
        declare_parameter(self, "weight", (out_size, in_size), mesh, init=init, **place)
        if has_bias:
            declare_parameter(self, "bias", (out_size,), mesh, init=Constant(0.0), **place)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, *self.local())

    def local(self) -> WeightAndBias:
        """What this rank multiplies by, `[out/t, in]`, and adds."""
        weight = self.weight.to_local()
        bias = None if self.bias is None else self.bias.to_local()
        if self.block is not None:
            weight = weight.narrow(0, *self.block)
            bias = None if bias is None else bias.narrow(0, *self.block)
        return weight, bias


class MergedColumnParallelLinear(nn.Module):
    """Y_w = X A_w^T + b_w for one or several weights A_w, each split by rows over the tp axis.

        A = [A_1; ...; A_t]      Y = [Y_1 ... Y_t]      Y_i = X A_i^T + b_i

    Input `[s/t, b, in]`. Output, one tensor for each weight in the order given: `[s, b, out/t]`.
    Forward: all-gather of the input (or nothing). Backward: reduce-scatter (or all-reduce) of dX.
    Weights that read the same input share the gather. Each is a parameter of its own, so that a
    shard is one contiguous slice and the names do not depend on the layout.

    `num_row_groups` names the weights whose rows come in blocks that no two ranks may split.
    With fewer blocks than ranks, several ranks compute the same block: `[s, b, out/groups]`.
    """

    def __init__(
        self,
        in_size: int,
        out_sizes: Mapping[str, int],
        mesh: Mesh,
        init: Normal,
        *,
        has_bias: bool = True,
        num_row_groups: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.mesh = mesh
        for name, out_size in out_sizes.items():
            blocks = (num_row_groups or {}).get(name)
            weight = _ColumnWeight(
                in_size, out_size, mesh, init, has_bias=has_bias, num_row_groups=blocks
            )
            self.add_module(name, weight)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.mesh.overlap != "none":
            weights = [weight.local() for weight in self.children()]  # type: ignore[operator]
            return column_parallel_linear(x, weights, self.mesh)
        x = enter_tensor_parallel_region(x, self.mesh)  # [s, b, in]
        return tuple(weight(x) for weight in self.children())  # each [s, b, out/t]


class RowParallelLinear(nn.Module):
    """Y = X A^T + b with A split by columns over the tp axis, X split to match.

        A = [A_1 ... A_t]      X = [X_1 ... X_t]      Y = sum_i X_i A_i^T + b

    Input `[s, b, in/t]`. Output `[s/t, b, out]`.
    Forward: reduce-scatter (or all-reduce) of the output. Backward: all-gather (or nothing).
    The bias is added once, after the sum: inside the product it would be added t times. With
    sequence parallelism it then meets s/t positions only, so its gradient is partial.
    """

    weight: DTensor
    bias: DTensor | None

    def __init__(
        self, in_size: int, out_size: int, mesh: Mesh, init: Normal, *, has_bias: bool = True
    ) -> None:
        super().__init__()
        self.mesh = mesh
        declare_parameter(self, "weight", (out_size, in_size), mesh, init=init, tp_dim=1)
        if has_bias:
            declare_parameter(
                self,
                "bias",
                (out_size,),
                mesh,
                init=Constant(0.0),
                grad_is_partial=mesh.sequence_parallel,
            )
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

    torch sums in the precision of dy, which on a processor loses percents of a frequent token's
    gradient in bfloat16 (measured: 7 % at 2,500 occurrences).
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
    """Rows of a table, `[rows, h]` and `[...]` to `[..., h]`; its gradient is summed in float32."""
    return _Lookup.apply(table, ids)


class VocabParallelEmbedding(nn.Module):
    """Rows of a table that is split by vocabulary over the tp axis.

    Input: token ids `[s, b]`, the same on all tp ranks. Output `[s/t, b, h]`.
    A rank looks up the ids it has and writes zeros for the others; the sum over tp is the lookup.
    Forward: reduce-scatter (or all-reduce). Backward: all-gather (or nothing).
    """

    weight: DTensor

    def __init__(self, vocab_size: int, hidden_size: int, mesh: Mesh, init: Normal) -> None:
        super().__init__()
        self.mesh = mesh
        self.first_id, self.end_id = shard_range(vocab_size, mesh.tp.size, mesh.tp.rank)
        declare_parameter(self, "weight", (vocab_size, hidden_size), mesh, init=init, tp_dim=0)

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
    """Logits over this rank's part of the vocabulary, of all positions or of some.

    `x` `[s/t, b, h]`, `weight` `[v/t, h]` (the head's or the tied embedding's shard); result
    `[s, b, v/t]` in float32 at least. Forward: all-gather of x (or nothing). Backward:
    reduce-scatter (or all-reduce).
    """
    return linear_fp32(enter_tensor_parallel_region(x, mesh)[positions], weight)
