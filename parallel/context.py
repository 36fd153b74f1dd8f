"""Context parallelism: attention over a sequence that is sharded over cp ranks.

A row is cut into 2c chunks of s/2c positions, and rank r has chunks r and 2c - 1 - r
(ops/balance.py). Its queries see the keys of

    rank r itself    causally, as its two chunks are in order
    a rank o < r     chunk o only, all of it, from both chunks of queries
    a rank o > r     both chunks, all of them, from the second chunk of queries only

so every rank does equal work: s^2 / (2 c^2) scores for each other rank, fewer where documents are
kept apart (ops/segments.py). The outputs for the keys of each rank are merged by their log-sum-exp.
Backward for the keys of each rank uses the merged output and log-sum-exp, so that the results add
up to the exact gradient.

Only this rank's keys and values are saved. In forward, and again in backward, the others arrive

    all_gather    all at once; a reduce-scatter sums the gradients
    p2p           around a ring, each shard while the previous one is in use, so a rank holds two;
                  in backward the gradients follow their shards

Each way sends (c - 1) / c of the full K and V in forward, and twice that in backward.

Sources: Liu et al. 2023, ring attention (2310.01889); Llama 3 (2407.21783, section 3.3.2).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ops.sdpa import attend, attend_backward
from ops.segments import KeyBlocks
from parallel.collectives import reduce_scatter, start_all_gather, start_shift
from parallel.mesh import Axis, Mesh


def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: KeyBlocks, mesh: Mesh
) -> Tensor:
    """Causal attention to the keys of all cp ranks; the result is `[s/c, b, a/t, d]`.

    `q` `[s/c, b, a/t, d]`; `k`, `v` `[s/c, b, g/t, d]`.
    Forward: all-gather of K and V, or c - 1 shifts. Backward: again, and for their gradients a
    reduce-scatter or c - 1 shifts.
    """
    return _ContextAttention.apply(q, k, v, blocks, mesh)


class _ContextAttention(torch.autograd.Function):
    """softmax(q K^T / sqrt(d)) V with the K and V of all ranks; saves this rank's k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: KeyBlocks, mesh: Mesh) -> Tensor:
        y = log_sum_exp = torch.empty(0)
        for rank, keys, values in _keys_of_ranks(k, v, mesh):
            if rank not in blocks:
                continue
            of_queries, of_keys, segments, is_causal = blocks[rank]
            part = attend(q[of_queries], keys[of_keys], values[of_keys], segments, is_causal)
            if rank == mesh.cp.rank:  # comes first, and has keys for every query
                y = part[0].to(part[1].dtype, memory_format=torch.contiguous_format, copy=True)
                log_sum_exp = part[1].clone()
            else:
                _merge_(y[of_queries], log_sum_exp[..., of_queries], *part)
        y = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, log_sum_exp)
        ctx.blocks, ctx.mesh = blocks, mesh
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, log_sum_exp = ctx.saved_tensors
        grad_q = torch.zeros_like(q, dtype=log_sum_exp.dtype)

        def gradients() -> Iterator[tuple[int, Tensor]]:
            """Gradients `[s/c, 2, b, g/t, d]` of the keys and values of each rank."""
            for rank, keys, values in _keys_of_ranks(k, v, ctx.mesh):
                grad = torch.zeros((len(k), 2, *k.shape[1:]), dtype=k.dtype, device=k.device)
                if rank in ctx.blocks:
                    rows, of_keys, segments, is_causal = ctx.blocks[rank]
                    saved = (y[rows], log_sum_exp[..., rows], segments, is_causal)
                    operands = (q[rows], keys[of_keys], values[of_keys])
                    part, *of_pair = attend_backward(grad_y[rows], *operands, *saved)
                    grad_q[rows] += part
                    grad[of_keys] = torch.stack(of_pair, dim=1).to(k.dtype)
                yield rank, grad

        sum_gradients = {"all_gather": _sum_by_reduce_scatter, "p2p": _sum_around_ring}
        grad_k, grad_v = sum_gradients[ctx.mesh.cp_comm_type](gradients(), ctx.mesh.cp).unbind(1)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


def _merge_(y: Tensor, log_sum_exp: Tensor, other_y: Tensor, other_log_sum_exp: Tensor) -> None:
    """Merge another set of keys into the output `[n, b, a, d]` and log-sum-exp `[b, a, n]`."""
    total = torch.logaddexp(log_sum_exp, other_log_sum_exp)

    def weight(part: Tensor) -> Tensor:
        return (part - total).exp().permute(2, 0, 1).unsqueeze(3)

    y.mul_(weight(log_sum_exp)).add_(other_y * weight(other_log_sum_exp))
    log_sum_exp.copy_(total)


def _keys_of_ranks(k: Tensor, v: Tensor, mesh: Mesh) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each cp rank with its keys and values: this rank, then those before it on the ring."""
    cp, own = mesh.cp, torch.stack((k, v), dim=1)  # [s/c, 2, b, g/t, d]
    pairs = _gather(own, cp) if mesh.cp_comm_type == "all_gather" else _ring(own, cp)
    for step, pair in enumerate(pairs):
        keys, values = pair.unbind(1)
        yield (cp.rank - step) % cp.size, keys, values


def _gather(pair: Tensor, cp: Axis) -> Iterator[Tensor]:
    gathering = start_all_gather(pair, cp)
    yield pair
    by_rank = gathering.wait().chunk(cp.size)
    for step in range(1, cp.size):
        yield by_rank[cp.rank - step]  # from the end where negative


def _ring(pair: Tensor, cp: Axis) -> Iterator[Tensor]:
    spare = torch.empty_like(pair)
    for _ in range(cp.size - 1):
        receiving = start_shift(pair, spare, cp)
        yield pair
        pair, spare = receiving.wait(), pair
    yield pair


def _sum_by_reduce_scatter(gradients: Iterator[tuple[int, Tensor]], cp: Axis) -> Tensor:
    by_rank = dict(gradients)
    return reduce_scatter(torch.cat([by_rank[rank] for rank in range(cp.size)]), cp)


def _sum_around_ring(gradients: Iterator[tuple[int, Tensor]], cp: Axis) -> Tensor:
    """Send the sum for each rank along with its keys; the last shift brings it home."""
    _, own = next(gradients)
    receiving = None
    for _, grad in gradients:
        total = grad if receiving is None else grad.add_(receiving.wait())
        receiving = start_shift(total, torch.empty_like(total), cp)
    assert receiving is not None, "a ring has two ranks or more"
    return own + receiving.wait()
