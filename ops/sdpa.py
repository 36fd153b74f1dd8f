"""Scaled dot-product attention, softmax(q k^T / sqrt(d)) v, and what it saves for backward.

torch's function takes `[b, a, s, d]` and saves q, k, v and its output. The output is then copied to
`[s, b, h]`, and the projection saves that copy too, which wastes 2 `sbh` bytes. So on a CPU one
autograd function calls torch's kernels and saves only the copy; elsewhere the copy is recomputed
(model/attention.py).

With several documents in a row (ops/segments.py), flash attention on CUDA is one variable-length
call. Every other kernel is called once per segment.
"""

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.matmul import attention_dtype, widen_for_fp32
from ops.segments import PackedSequences, Segments
from ops.torch_private import (
    efficient_attention_on_cuda,
    efficient_attention_on_cuda_backward,
    flash_attention_on_cpu,
    flash_attention_on_cpu_backward,
    flash_attention_on_cuda,
    flash_attention_on_cuda_backward,
    flash_varlen_on_cuda,
    flash_varlen_on_cuda_backward,
)

# Of CUDA's kernels, in elements.
_LSE_ALIGNMENT, HEAD_ALIGNMENT = 32, 8
_NO_KEYS = -math.inf  # the log-sum-exp of a query without keys


def avoid_cudnn_attention() -> None:
    """Let torch choose flash attention on GPUs where it would prefer cuDNN's, in bf16 on an H100.

    cuDNN makes a plan for each new shape, and decoding has a new one per token.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, dropout: float) -> Tensor:
    """Causal attention of queries to the keys of their segment; the result is `[s, b, a/t, d]`.

    `q` `[s, b, a/t, d]`; `k`, `v` `[s, b, g/t, d]`, each shared by a/g neighbouring query heads.
    `segments` has every query; None: a query sees all earlier keys of its row.

    With dropout, a CPU stores all probabilities `[b, a/t, s, s]`, or those of each segment.
    """
    is_on_cpu = q.device.type == "cpu"
    has_segment_kernel = segments is not None and q.shape[-1] % HEAD_ALIGNMENT == 0
    if dropout == 0.0 and (is_on_cpu or has_segment_kernel):
        return _FlashAttention.apply(q, k, v, segments)
    if segments is not None:
        rows = [
            torch.cat([sdpa(q[i, row], k[j, row], v[j, row], None, dropout) for _, i, j in parts])
            for row, parts in groupby(segments.parts, key=lambda part: part.rows)
        ]
        return torch.cat(rows, dim=1)
    if q.shape[2] != k.shape[2] and q.dtype == torch.float32:
        # On a GPU only flash attention supports groups, and it does not take float32; torch would
        # fall back to a kernel that stores all probabilities.
        k, v = _repeat_groups(k, q), _repeat_groups(v, q)
    q, k, v = (_batch_first(heads) for heads in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )
    return _sequence_first(y)


def sdpa_with_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal `sdpa` from the last n of m positions; no backward.

    `q`, and the result, `[n, b, a/t, d]`; `k`, `v` `[m, b, g/t, d]`. The queries of a group become
    rows of one matmul with its keys, so that keys are not repeated.
    """
    n, b, a, d = q.shape
    m, _, groups, _ = k.shape
    rows = q.view(n, b, groups, -1, d).permute(1, 2, 3, 0, 4).flatten(2, 3)  # [b, g/t, a/g n, d]
    mask = None
    if n > 1:  # a single query is at the last position and sees all keys
        mask = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        mask = mask.repeat(a // groups, 1)  # [a/g n, m]
    y = F.scaled_dot_product_attention(rows, _batch_first(k), _batch_first(v), attn_mask=mask)
    return y.unflatten(2, (-1, n)).permute(3, 0, 1, 2, 4).reshape(n, b, a, d)


class _FlashAttention(torch.autograd.Function):
    """Flash attention, on CPUs in the dtype that is fast there."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        y, log_sum_exp = attend(q, k, v, segments, is_causal=True)
        y = torch.empty_like(q, memory_format=torch.contiguous_format).copy_(y)
        ctx.save_for_backward(q, k, v, y, log_sum_exp)
        ctx.segments = segments
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sum_exp = ctx.saved_tensors
        grads = attend_backward(grad_y, q, k, v, y, log_sum_exp, ctx.segments, is_causal=True)
        return *(grad.to(q.dtype) for grad in grads), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention to some keys: the output `[n, b, a/t, d]`, log-sum-exp `[b, a/t, n]`; no autograd.

    `q` `[n, b, a/t, d]`; `k`, `v` `[m, b, g/t, d]`. The log-sum-exp of the scores, in float32 at
    least, allows merging the outputs of several sets of keys; it is -inf for a query without keys.
    """
    q, k, v = _operands(q, k, v)
    if segments is None:
        return _attend(q, k, v, is_causal)
    if _has_varlen(q):
        return _attend_varlen(q, k, v, segments, is_causal)
    n, b, a, _ = q.shape
    y = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    log_sum_exp = torch.full((b, a, n), _NO_KEYS, dtype=lse_dtype, device=q.device)
    for rows, i, j in segments.parts:
        y[i, rows], log_sum_exp[rows, :, i] = _attend(q[i, rows], k[j, rows], v[j, rows], is_causal)
    return y, log_sum_exp


def attend_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sum_exp: Tensor,
    segments: Segments | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through `attend`, in the dtype of the kernel.

    With `y` and `log_sum_exp` over all keys but only some of `k` and `v`, these are exactly the
    parts of the gradients that pass through those keys.
    """
    groups = k.shape[2]
    q, k, v = _operands(q, k, v)
    y, grad_y = _widen(y, "y"), _widen(grad_y, "grad_y")
    if segments is None:
        grads = _attend_backward(grad_y, q, k, v, y, log_sum_exp, is_causal)
    elif _has_varlen(q):
        grads = _attend_varlen_backward(grad_y, q, k, v, y, log_sum_exp, segments, is_causal)
    else:
        grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        for rows, i, j in segments.parts:
            grads[0][i, rows], grads[1][j, rows], grads[2][j, rows] = _attend_backward(
                *(grad_y[i, rows], q[i, rows], k[j, rows], v[j, rows], y[i, rows]),
                *(log_sum_exp[rows, :, i], is_causal),
            )
    grad_q, grad_k, grad_v = grads
    if groups != q.shape[2]:  # sum over the query heads that share a key
        grad_k, grad_v = (grad.unflatten(2, (groups, -1)).sum(dim=3) for grad in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


def _attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """`attend` without segments, on the result of `_operands`."""
    operands, n = [_batch_first(heads) for heads in (q, k, v)], len(q)
    if q.device.type == "cpu":
        y, log_sum_exp = flash_attention_on_cpu(*operands, 0.0, is_causal)
    elif q.dtype != torch.float32:
        y, log_sum_exp = flash_attention_on_cuda(*operands, 0.0, is_causal)[:2]
    else:
        y, log_sum_exp = efficient_attention_on_cuda(*operands, None, True, 0.0, is_causal)[:2]
    return _sequence_first(y), log_sum_exp[..., :n]


def _attend_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sum_exp: Tensor,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    grad_y, *operands, y = (_batch_first(heads) for heads in (grad_y, q, k, v, y))
    common: tuple[Any, ...]
    if q.device.type == "cpu":
        common = (y, log_sum_exp, 0.0, is_causal)
        grads = flash_attention_on_cpu_backward(grad_y, *operands, *common)
    elif q.dtype != torch.float32:
        seed = _no_seed(q)
        common = (y, log_sum_exp.contiguous(), None, None, len(q), len(k), 0.0, is_causal)
        grads = flash_attention_on_cuda_backward(grad_y, *operands, *common, seed, seed)
    else:
        seed, padded = _no_seed(q), F.pad(log_sum_exp, (0, -len(q) % _LSE_ALIGNMENT))
        common = (None, y, padded, seed, seed, 0.0, [True, True, True, False], is_causal)
        grads = efficient_attention_on_cuda_backward(grad_y, *operands, *common)[:3]
    return tuple(_sequence_first(grad) for grad in grads)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """`attend` to all segments in one call, on the result of `_operands`."""
    queries, keys = segments.queries, segments.keys
    packed = _pack(q, queries), _pack(k, keys), _pack(v, keys)
    y, log_sum_exp = flash_varlen_on_cuda(*packed, *_lengths(segments), 0.0, is_causal, False)[:2]
    log_sum_exp = _unpack(log_sum_exp.t(), queries, q, _NO_KEYS)  # [n, b, a/t]
    return _unpack(y, queries, q), log_sum_exp.permute(1, 2, 0)


def _attend_varlen_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sum_exp: Tensor,
    segments: Segments,
    is_causal: bool,
) -> tuple[Tensor, ...]:
    queries, keys = segments.queries, segments.keys
    packed = [_pack(x, of) for x, of in ((grad_y, queries), (q, queries), (k, keys), (v, keys))]
    lse = _pack(log_sum_exp.permute(2, 0, 1), queries).t().contiguous()
    options = 0.0, is_causal, _no_seed(q), _no_seed(q)
    grads = flash_varlen_on_cuda_backward(
        *packed, _pack(y, queries), lse, *_lengths(segments), *options
    )
    return tuple(
        _unpack(grad, of, like)
        for grad, of, like in zip(grads, (queries, keys, keys), (q, k, v), strict=True)
    )


def _widen(x: Tensor, use: str) -> Tensor:
    """Return x in its attention dtype; a copy is in scratch memory, see `widen`."""
    return x if attention_dtype(x) == x.dtype else widen_for_fp32(x, use)


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in their attention dtype, a key and a value for each query head."""
    k, v = _repeat_groups(_widen(k, "k"), q), _repeat_groups(_widen(v, "v"), q)
    return _widen(q, "q"), k, v


def _repeat_groups(heads: Tensor, q: Tensor) -> Tensor:
    """`[s, b, g/t, d]` to `[s, b, a/t, d]`: neighbouring query heads share a group."""
    heads_per_group = q.shape[2] // heads.shape[2]
    return heads if heads_per_group == 1 else heads.repeat_interleave(heads_per_group, dim=2)


def _has_varlen(q: Tensor) -> bool:
    """Whether there is a variable-length kernel; on CUDA there is none for float32."""
    return q.device.type != "cpu" and q.dtype != torch.float32


def _pack(x: Tensor, sequences: PackedSequences) -> Tensor:
    """The positions of sequences: `[s, b, ...]` to `[n, ...]`."""
    return x.flatten(0, 1).index_select(0, sequences.indices)


def _unpack(x: Tensor, sequences: PackedSequences, like: Tensor, fill: float = 0.0) -> Tensor:
    """`[n, ...]` to the `[s, b, ...]` of another tensor, with `fill` outside the sequences."""
    shape = like.shape[:2]
    y = x.new_full((shape.numel(), *x.shape[1:]), fill)
    return y.index_copy_(0, sequences.indices, x).unflatten(0, shape)


def _lengths(segments: Segments) -> tuple[Tensor, Tensor, int, int]:
    queries, keys = segments.queries, segments.keys
    return queries.offsets, keys.offsets, queries.max_length, keys.max_length


def _no_seed(q: Tensor) -> Tensor:
    """A random state, which kernels ignore without dropout."""
    return torch.empty(0, dtype=torch.int64, device=q.device)


def _batch_first(heads: Tensor) -> Tensor:
    """`[s, b, a, d]` to `[b, a, s, d]`, a view."""
    return heads.permute(1, 2, 0, 3)


def _sequence_first(heads: Tensor) -> Tensor:
    """`[b, a, s, d]` to `[s, b, a, d]`, a view."""
    return heads.permute(2, 0, 1, 3)
