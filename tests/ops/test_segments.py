"""Attention inside documents, without masks, equals attention with a mask."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ops import sdpa as module
from ops.balance import balanced_positions
from ops.sdpa import attend, attend_backward, sdpa
from ops.segments import KeyBlock, PackedSequences, make_key_blocks
from ops.torch_private import flash_attention_on_cpu, flash_attention_on_cpu_backward
from tests.distributed import DEVICE
from tests.reference import document_numbers

S, B = 24, 3


def random_documents(seed: int) -> list[list[int]]:
    """Rows of many, few and single documents, some rows equal."""
    generator = torch.Generator().manual_seed(seed)
    rate = (0.0, 0.1, 0.3, 1.0)[seed % 4]
    begins = torch.rand(B, S, generator=generator) < rate
    begins[:, 0] = True
    begins[1] = begins[seed % 2]
    return [row.nonzero().flatten().tolist() for row in begins]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_key_blocks_are_those_of_the_mask(size: int) -> None:
    """A query sees the keys of the mask, once each; empty segments and blocks are left out."""
    num_hidden = 0
    for seed in range(40):
        documents = random_documents(seed)
        numbers = document_numbers(documents, S)
        mask = (numbers[:, :, None] == numbers[:, None]).tril()  # [b, s, s]
        for rank in range(size):
            mine = balanced_positions(S, rank, size)
            blocks = make_key_blocks(S, documents, rank, size)
            for other in range(size):
                of_rank = mask[:, mine][:, :, balanced_positions(S, other, size)]
                assert (other in blocks) == bool(of_rank.any())
                if other in blocks:
                    assert torch.equal(counts(blocks[other], *of_rank.shape[1:]), of_rank.int())
            num_hidden += size - len(blocks)
    assert (num_hidden > 0) == (size > 1)


def counts(block: KeyBlock, num_queries: int, num_keys: int) -> Tensor:
    """How often a query sees a key, `[b, queries, keys]`; both forms of the segments agree."""
    count = torch.zeros(B, num_queries, num_keys, dtype=torch.int32)
    inside = count[:, block.queries, block.keys]
    if block.segments is None:
        inside += 1
    else:
        for rows, queries, keys in block.segments.parts:
            inside[rows, queries, keys] += 1
        packed = [runs(of) for of in (block.segments.queries, block.segments.keys)]
        for queries, keys in zip(*packed, strict=True):
            rows = (torch.cat((queries, keys)) % B).unique()
            assert (inside[rows][:, queries // B][:, :, keys // B] == 1).all()
        assert sum(len(q) * len(k) for q, k in zip(*packed, strict=True)) == inside.sum()
    return count.tril() if block.is_causal else count


def runs(packed: PackedSequences) -> Sequence[Tensor]:
    parts = packed.indices.tensor_split(packed.offsets[1:-1].long())
    assert max(map(len, parts)) == packed.max_length
    assert packed.offsets[-1] == len(packed.indices)
    return parts


def flash_varlen(*operands: Any) -> tuple[Tensor, Tensor]:
    """CUDA's kernel, emulated with the CPU's."""
    *tensors, of_queries, of_keys, _, _, dropout, is_causal, _ = operands
    parts = [
        flash_attention_on_cpu(*of_sequence, dropout, is_causal)
        for of_sequence in zip(*split(tensors, (of_queries, of_keys, of_keys)), strict=True)
    ]
    return merge(y for y, _ in parts), torch.cat([lse[0] for _, lse in parts], dim=1)


def flash_varlen_backward(*operands: Any) -> tuple[Tensor, ...]:
    grad, q, k, v, y, lse, of_queries, of_keys, _, _, dropout, is_causal, _, _ = operands
    offsets = (of_queries, of_queries, of_keys, of_keys, of_queries)
    tensors = split((grad, q, k, v, y), offsets)
    of_lse = lse[None].tensor_split(of_queries[1:-1].long(), dim=2)
    grads = [
        flash_attention_on_cpu_backward(*of_sequence, dropout, is_causal)
        for of_sequence in zip(*tensors, of_lse, strict=True)
    ]
    return tuple(merge(parts) for parts in zip(*grads, strict=True))


def split(tensors: Sequence[Tensor], offsets: Sequence[Tensor]) -> list[list[Tensor]]:
    """`[positions, a, d]` to `[1, a, s, d]` for each sequence."""
    return [
        [part.transpose(0, 1)[None] for part in x.tensor_split(ends[1:-1].long())]
        for x, ends in zip(tensors, offsets, strict=True)
    ]


def merge(parts: Any) -> Tensor:
    return torch.cat([part[0].transpose(0, 1) for part in parts])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", [1, 2, 3, 6])
def test_a_varlen_call_equals_one_call_per_segment(
    monkeypatch: pytest.MonkeyPatch, seed: int, size: int
) -> None:
    """The variable-length kernel of CUDA, emulated on CPUs."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "flash_varlen_on_cuda", flash_varlen)
        monkeypatch.setattr(module, "flash_varlen_on_cuda_backward", flash_varlen_backward)
    dtype, error = (torch.float32, 1e-5) if DEVICE == "cpu" else (torch.bfloat16, 2e-2)
    generator = torch.Generator().manual_seed(seed)
    n, blocks = S // size, make_key_blocks(S, random_documents(seed), 0, size)
    for block in blocks.values():
        _, of_queries, of_keys = counts(block, n, n).shape
        shapes = [(of_queries, B, 4, 8), *[(of_keys, B, 2, 8)] * 2, (of_queries, B, 4, 8)]
        q, k, v, grad = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
        q, grad, k, v = q[block.queries], grad[block.queries], k[block.keys], v[block.keys]
        segments = block.map(lambda tensor: tensor.to(DEVICE)).segments
        assert segments is not None
        results = []
        for has_varlen in (False, True):
            monkeypatch.setattr(module, "_has_varlen", lambda _, result=has_varlen: result)
            y, lse = attend(q, k, v, segments, block.is_causal)
            grads = attend_backward(grad, q, k, v, y, lse, segments, block.is_causal)
            results.append((y, lse, *grads))
        for one, other in zip(*results, strict=True):
            assert_close(one, other, rtol=error, atol=error)


def test_attention_dropout_stays_in_documents() -> None:
    """Values of another document change nothing; rate and scale are right."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, S, B, 2, 8, generator=generator).to(DEVICE)
    segments = make_key_blocks(S, [[0, 10], [0], [0, 10]])[0].segments
    assert segments is not None
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(sdpa(q, k, v, segments, 0.5))
        v[:10, ::2] += 1
    changed = (results[0] != results[1]).any(3).any(2)
    assert not changed[10:].any()
    assert not changed[:, 1].any()
    assert changed[4:10, ::2].all()
    many = torch.ones(S, B, 512, 8, device=DEVICE)
    assert sdpa(many, many, many, segments, 0.5).mean() == pytest.approx(1, rel=0.05)
