"""FSDP2 on CPUs overlaps gathers and sums with compute, with the same results."""

import dataclasses
import os
from collections import Counter
from typing import Literal

import pytest
import torch

from configs.schema import Config, DataConfig, TrainConfig
from model import GPT, build_model
from parallel import Mesh, init_mesh, sum_partial_gradients
from parallel.transport.traffic import record_traffic
from tests.distributed import Layout, distributed
from tests.model.test_gpt import STREAM, TINY, VOCAB, batch
from tests.weights import gradient_shards

LAYERS = 4
PLAIN = Config(
    model=dataclasses.replace(TINY, num_layers=LAYERS),
    data=DataConfig(vocab_size=VOCAB),
    train=TrainConfig(precision="fp32"),
)


def build(mesh: Mesh, *, overlap: bool, **parallel: str) -> GPT:
    changed = dataclasses.replace(PLAIN.parallel, dp_comm_overlap=overlap, **parallel)  # type: ignore[arg-type]
    return build_model(dataclasses.replace(PLAIN, parallel=changed), mesh)


def backward(model: GPT) -> None:
    tokens, positions, targets = batch()
    model(tokens, positions, targets, STREAM).objective.backward()


@distributed(Layout(dp=2), Layout(dp=4), Layout(tp=2, dp=2))
@pytest.mark.parametrize("recompute_granularity", ["none", "full"])
def test_gradients_are_summed_under_backward(mesh: Mesh, recompute_granularity: str) -> None:
    """The last two sums are still running when backward returns; results are bit for bit equal."""
    gradients, traffic = [], []
    for overlap in (False, True):
        model = build(mesh, overlap=overlap, recompute_granularity=recompute_granularity)
        with record_traffic() as sent:
            backward(model)
            if overlap:
                assert len(model.deferred.pending) == 2
            sum_partial_gradients(model, mesh)
        if overlap:
            assert not model.deferred.pending
        gradients.append(gradient_shards(model))
        traffic.append(Counter(sent))
    for name, without in gradients[0].items():
        assert torch.equal(without.tensor, gradients[1][name].tensor), name
    assert traffic[0] == traffic[1]


@distributed(Layout(dp=2))
@pytest.mark.parametrize("overlap", [False, True])
def test_weights_are_prefetched(mesh: Mesh, overlap: bool) -> None:
    """While a block computes, the gather for the next one (in backward, the previous) is running.

    FSDP2 keeps the result of a running gather in `_all_gather_result`.
    """
    model = build(mesh, overlap=overlap)
    is_prefetched = []

    def look(number: int) -> None:
        state = model.blocks[number]._get_fsdp_state()  # type: ignore[operator]
        # torch 2.11 has one group.
        (group,) = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        result = group._all_gather_result
        is_prefetched.append(result is not None and result.all_gather_work is not None)

    for number in range(LAYERS - 1):
        model.blocks[number].mlp_norm.register_forward_hook(  # type: ignore[union-attr,operator]
            lambda *_, following=number + 1: look(following)
        )
    for number in range(1, LAYERS):
        model.blocks[number].mlp_norm.register_full_backward_hook(  # type: ignore[union-attr,operator]
            lambda *_, before=number - 1: look(before)
        )
    backward(model)
    sum_partial_gradients(model, mesh)
    assert is_prefetched == [overlap] * 2 * (LAYERS - 1)


@pytest.mark.parametrize(
    ("tp", "world_size", "overlap", "chosen", "expected"),
    [
        (2, 2, "backward", None, "1"),
        (2, 2, "both", "8", "8"),
        (2, 2, "none", None, None),
        (1, 2, "backward", None, None),
        (2, 4, "backward", None, None),  # FSDP2 has its own streams
        (1, 1, "backward", None, None),
    ],
)
def test_a_gpu_starts_kernels_in_order_only_for_tensor_parallelism(
    monkeypatch: pytest.MonkeyPatch,
    tp: int,
    world_size: int,
    overlap: Literal["none", "backward", "both"],
    chosen: str | None,
    expected: str | None,
) -> None:
    """The variable is set before CUDA starts, where this test stops."""

    class CudaStarts(Exception):  # noqa: N818
        pass

    def start(_: object) -> None:
        raise CudaStarts

    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.setenv(variable, chosen or "")
    if chosen is None:
        monkeypatch.delenv(variable)
    for name, value in {"RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # set by the user, so left unchanged
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", start)
    monkeypatch.setattr("parallel.mesh.join_attempt", lambda *_: ("", None, "cuda", False))
    with pytest.raises(CudaStarts):
        init_mesh(tp, True, overlap)
    assert os.environ.get(variable) == expected


@distributed(Layout(dp=2))
def test_sums_of_every_micro_batch_are_not_deferred(mesh: Mesh) -> None:
    """FSDP2 accumulates them at once, so none may still be running."""
    model = build(mesh, overlap=True, gradient_sync="micro_batch")
    backward(model)
    assert not hasattr(model, "deferred")
