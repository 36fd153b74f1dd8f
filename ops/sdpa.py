"""Scaled dot-product attention, softmax(q k^T / sqrt(d)) v, and what it saves for backward.

torch's function takes `[b, a, s, d]` and saves q, k, v and its output. The output must be copied to
become `[s, b, h]`, and the projection that reads the copy saves it too: 2 bytes of `sbh` wasted. So
on a CPU its forward and backward are called here as one autograd function, which saves only the
copy; elsewhere the copy is recomputed (model/attention.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ops.matmul import attention_dtype, widen_for_fp32
from ops.torch_private import (
    efficient_attention_on_cuda,
    efficient_attention_on_cuda_backward,
    flash_attention_on_cpu,
    flash_attention_on_cpu_backward,
    flash_attention_on_cuda,
    flash_attention_on_cuda_backward,
)

# Added to the score of a key that a query does not see. Finite, because the log-sum-exp of a query
# that sees no key of a block must not be NaN; the query's weight there is exactly 0 nevertheless.
_HIDDEN = -1e30
_LSE_ALIGNMENT, _BIAS_ALIGNMENT = 32, 16  # of CUDA's efficient kernel, in elements


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attend from each query to the values it may see; the result is `[s, b, a/t, d]`.

    `q` `[s, b, a/t, d]`; `k`, `v` `[s, b, g/t, d]`, each shared by a/g neighbouring query heads.
    `mask` `[b, 1, s, s]` is true where a query (row) sees a key; None: causal.

    With dropout, a CPU stores all probabilities `[b, a/t, s, s]` instead of flash attention's
    blocks.
    """
    if q.device.type == "cpu" and dropout == 0.0:
        return _FlashAttention.apply(q, k, v, mask)
    if q.shape[2] != k.shape[2] and (mask is not None or q.dtype == torch.float32):
        # On a GPU only flash attention supports groups, and it takes neither a mask nor float32;
        # torch would fall back to a kernel that stores all probabilities.
        k, v = _repeat_groups(k, q), _repeat_groups(v, q)
    q, k, v = (_batch_first(heads) for heads in (q, k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
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
    """torch's flash attention for CPUs, in the dtype that is fast there."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y, log_sum_exp = attend(q, k, v, mask, mask is None)
        y = torch.empty_like(q, memory_format=torch.contiguous_format).copy_(y)
        ctx.save_for_backward(q, k, v, y, log_sum_exp, mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sum_exp, mask = ctx.saved_tensors
        grads = attend_backward(grad_y, q, k, v, y, log_sum_exp, mask, mask is None)
        return *(grad.to(q.dtype) for grad in grads), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention to some keys: the output `[n, b, a/t, d]`, log-sum-exp `[b, a/t, n]`; no autograd.

    `q` `[n, b, a/t, d]`; `k`, `v` `[m, b, g/t, d]`; `mask` `[b, 1, n, m]`, or None. The log-sum-exp
    of the scores, in float32 at least, allows merging the outputs of several sets of keys.
    """
    operands, bias = _operands(q, k, v), _as_bias(mask, q)
    if q.device.type == "cpu":
        y, log_sum_exp = flash_attention_on_cpu(*operands, 0.0, is_causal=is_causal, attn_mask=bias)
    elif mask is None and q.dtype != torch.float32:
        y, log_sum_exp = flash_attention_on_cuda(*operands, 0.0, is_causal)[:2]
    else:
        y, log_sum_exp = efficient_attention_on_cuda(*operands, bias, True, 0.0, is_causal)[:2]
        log_sum_exp = log_sum_exp[..., : len(q)]
    return _sequence_first(y), log_sum_exp


def attend_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    log_sum_exp: Tensor,
    mask: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v through `attend`, in the dtype of the kernel.

    With `y` and `log_sum_exp` over all keys and the `k` and `v` of some, these are exactly the
    parts of the whole gradients that pass through these keys.
    """
    operands, bias = _operands(q, k, v), _as_bias(mask, q)
    wide_grad, wide_y = _batch_first(_widen(grad_y, "grad_y")), _batch_first(_widen(y, "y"))
    common: tuple[Any, ...]
    if q.device.type == "cpu":
        common = (wide_y, log_sum_exp, 0.0, is_causal)
        grads = flash_attention_on_cpu_backward(wide_grad, *operands, *common, attn_mask=bias)
    elif mask is None and q.dtype != torch.float32:
        seed = _no_seed(q)
        common = (wide_y, log_sum_exp.contiguous(), None, None, len(q), len(k), 0.0, is_causal)
        grads = flash_attention_on_cuda_backward(wide_grad, *operands, *common, seed, seed)
    else:
        seed, padded = _no_seed(q), F.pad(log_sum_exp, (0, -len(q) % _LSE_ALIGNMENT))
        common = (bias, wide_y, padded, seed, seed, 0.0, [True, True, True, False], is_causal)
        grads = efficient_attention_on_cuda_backward(wide_grad, *operands, *common)[:3]
    grad_q, grad_k, grad_v = (_sequence_first(grad) for grad in grads)
    if k.shape[2] != q.shape[2]:  # sum over the query heads that share a key
        grad_k, grad_v = (
            grad.unflatten(2, (k.shape[2], -1)).sum(dim=3) for grad in (grad_k, grad_v)
        )
    return grad_q, grad_k, grad_v


def _widen(x: Tensor, use: str) -> Tensor:
    """Return x in its attention dtype; a copy is in scratch memory, see `widen`."""
    return x if attention_dtype(x) == x.dtype else widen_for_fp32(x, use)


def _operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as `[b, a/t, s, d]`, a key and a value for each query head."""
    k, v = _repeat_groups(_widen(k, "k"), q), _repeat_groups(_widen(v, "v"), q)
    return _batch_first(_widen(q, "q")), _batch_first(k), _batch_first(v)


def _repeat_groups(heads: Tensor, q: Tensor) -> Tensor:
    """`[s, b, g/t, d]` to `[s, b, a/t, d]`: neighbouring query heads share a group."""
    heads_per_group = q.shape[2] // heads.shape[2]
    return heads if heads_per_group == 1 else heads.repeat_interleave(heads_per_group, dim=2)


def _as_bias(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """An additive mask: 0 where a query sees a key, else `_HIDDEN`."""
    if mask is None:
        return None
    num_keys = mask.shape[-1]
    aligned = num_keys + (-num_keys % _BIAS_ALIGNMENT if q.is_cuda else 0)
    bias = torch.zeros((*mask.shape[:-1], aligned), dtype=attention_dtype(q), device=q.device)
    bias = bias[..., :num_keys].masked_fill_(~mask, _HIDDEN)
    return bias.expand(-1, q.shape[2], -1, -1) if q.is_cuda else bias


def _no_seed(q: Tensor) -> Tensor:
    """A random state that a kernel takes but does not read without dropout."""
    return torch.empty(0, dtype=torch.int64, device=q.device)


def _batch_first(heads: Tensor) -> Tensor:
    """`[s, b, a, d]` to `[b, a, s, d]`, a view."""
    return heads.permute(1, 2, 0, 3)


def _sequence_first(heads: Tensor) -> Tensor:
    """`[b, a, s, d]` to `[s, b, a, d]`, a view."""
    return heads.permute(2, 0, 1, 3)
