"""Linear layers and the embedding, sharded over the tensor-parallel axis.

`s` positions, `b` sequences, `t` tp ranks. `[s/t, b, h]` is with sequence parallelism; without it,
read `[s, b, h]`. Sources: Shoeybi et al. 2019, section 3 (tensor parallelism); Korthikanti et al.
2022, section 4.2.2 (sequence parallelism).
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.weights import Weights, WeightSpec
from ops.matmul import linear, linear_fp32
from parallel.mappings import enter_tensor_parallel_region, exit_tensor_parallel_region
from parallel.mesh import Mesh
from parallel.overlap import column_parallel_linear, row_parallel_linear
from parallel.parameters import declare_parameter, shard_range


class MergedColumnParallelLinear(nn.Module):
    """Y_w = X A_w^T + b_w for one or more weights A_w, each sharded by rows over tp.

        A = [A_1; ...; A_t]      Y = [Y_1 ... Y_t]      Y_i = X A_i^T + b_i

    Input `[s/t, b, in]`. Output: views `[s, b, out/t]` of one tensor, in the order of `weights`.
    Forward: all-gather of X (or nothing). Backward: reduce-scatter (or all-reduce) of dX; with
    overlap also another all-gather of X, of which only the shard is kept.
    A rank's rows of all weights are one parameter, so they share one gather and one matmul.
    A weight with fewer row groups than ranks is replicated, and t / groups ranks use the same
    group: the output is `[s, b, out/groups]`, and the weight's gradient is partial over tp.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weights: Weights, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        matrices = {name: spec for name, spec in weights.items() if name.endswith("weight")}
        biases = {name: spec for name, spec in weights.items() if name.endswith("bias")}
        declare_parameter(self, "weight", matrices, mesh)
        if biases:
            # Sharded like the weight and used at every position, so its gradient is complete.
            declare_parameter(self, "bias", biases, mesh)
        else:
            self.bias = None
        used = [_used_rows(spec, mesh) for spec in matrices.values()]
        self.sizes = [stop - start for start, stop, _ in used]  # columns of each output
        self.rows: list[tuple[int, int]] | None = None  # of the parameter; None: all of them
        if any(num_rows != stop - start for start, stop, num_rows in used):
            firsts = itertools.accumulate((num_rows for *_, num_rows in used), initial=0)
            self.rows = [
                (first + start, first + stop)
                for first, (start, stop, _) in zip(firsts, used, strict=False)
            ]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weight = self._used(self.weight).to(x.dtype)
        bias = None if self.bias is None else self._used(self.bias).to(x.dtype)
        if self.mesh.overlap != "none":
            y = column_parallel_linear(x, weight, bias, self.mesh)
        else:
            y = linear(enter_tensor_parallel_region(x, self.mesh), weight, bias)
        return y.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (y,)

    def _used(self, parameter: Tensor) -> Tensor:
        """The rows of a parameter that this rank uses."""
        if self.rows is None:
            return parameter
        return torch.cat([parameter[start:stop] for start, stop in self.rows])


def _used_rows(spec: WeightSpec, mesh: Mesh) -> tuple[int, int, int]:
    """Start and end of the rows that this rank uses among those it holds, and their number."""
    num_rows, t = spec.shape[0], mesh.tp.size
    if spec.tp_dim_at(t) is not None:
        start, stop = shard_range(num_rows, t, mesh.tp.rank)
        return 0, stop - start, stop - start
    num_groups = spec.num_row_groups
    assert num_groups, "a column-parallel weight must be sharded by rows"
    assert t % num_groups == 0, f"{num_groups} row groups, tp={t}"
    size = num_rows // num_groups
    start = mesh.tp.rank * num_groups // t * size
    return start, start + size, num_rows


class RowParallelLinear(nn.Module):
    """Y = X A^T + b with A sharded by columns over tp, and X to match.

        A = [A_1 ... A_t]      X = [X_1 ... X_t]      Y = sum_i X_i A_i^T + b

    Input `[s, b, in/t]`. Output `[s/t, b, out]`.
    Forward: reduce-scatter (or all-reduce) of Y. Backward: all-gather of dY (or nothing).
    The bias is added after the sum; before it, it would be added t times. With sequence
    parallelism it sees only s/t positions, so its gradient is partial.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weights: Weights, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        declare_parameter(self, "weight", weights["weight"], mesh)
        if bias := weights.get("bias"):
            declare_parameter(self, "bias", bias, mesh, grad_is_partial=mesh.sequence_parallel)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.mesh.overlap != "none":
            y = row_parallel_linear(x, weight, self.mesh)
        else:
            y = linear(x, weight)  # [s, b, out], a partial sum
            y = exit_tensor_parallel_region(y, self.mesh)  # [s/t, b, out]
        return y if self.bias is None else y + self.bias.to(x.dtype)


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


def lookup(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up rows of a table, `[rows, h]` and `[...]` to `[..., h]`; sums dA in float32."""
    return _Lookup.apply(table, ids).to(dtype)


class VocabParallelEmbedding(nn.Module):
    """Embedding lookup in a table that is sharded by vocabulary over tp.

    Input: token ids `[s, b]`, the same on all tp ranks. Output `[s/t, b, h]` in `dtype`.
    A rank looks up its own ids and writes zeros for the others; the sum over tp is the lookup.
    Forward: reduce-scatter (or all-reduce). Backward: all-gather (or nothing).
    """

    weight: Tensor

    def __init__(
        self, weight: WeightSpec, mesh: Mesh, dtype: torch.dtype, is_tied: bool = False
    ) -> None:
        super().__init__()
        self.mesh, self.dtype = mesh, dtype
        self.first_id, self.end_id = shard_range(weight.shape[0], mesh.tp.size, mesh.tp.rank)
        declare_parameter(self, "weight", weight, mesh, is_tied=is_tied)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.mesh.tp.size == 1:
            return lookup(self.weight, tokens, self.dtype)
        elsewhere = (tokens < self.first_id) | (tokens >= self.end_id)
        ids = (tokens - self.first_id).masked_fill(elsewhere, 0)
        rows = lookup(self.weight, ids, self.dtype)
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
