"""A step on a GPU has no implicit host-device synchronization; tested without a GPU.

The step runs on meta tensors instead of the GPU's; CPU tensors are real. A dispatch mode refuses
operations for which CUDA would make the host wait. `make gpu-check` counts them on a real GPU.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.ours import corpus_of
from configs import parse_config
from data.loader import BatchLoader
from model import build_meta_model
from parallel.loss import _CHUNK_ELEMENTS
from parallel.transport.traffic import fake_mesh
from training.optimizer import build_optimizer
from training.state import Run, RunState
from training.step import train_step

GPU = torch.device("meta")  # in place of cuda
# Results whose shape or value the host needs.
_WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
}


class Synchronization(Exception):  # noqa: N818
    """An operation for which the host would wait for the GPU."""


class SimulatedGpu(TorchDispatchMode):
    """A GPU whose tensors are meta tensors; refuses operations for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned, self.num_waits = set[int](), 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), func._opname
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.is_meta for tensor in tensors)
        to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU
        if on_gpu and (name in _WAITING or _has_mask_index(func, args)):
            raise Synchronization(name)
        if name == "_fused_adamw_":
            return None  # it has no form for meta tensors
        if name == "_to_copy" and kwargs.get("device") is not None and on_gpu != to_gpu:
            self._check_copy(None, tensors[0], kwargs.get("non_blocking", False))
        if name == "copy_" and tensors[0].is_meta != tensors[1].is_meta:
            self._check_copy(*tensors, non_blocking=(*args[2:], False)[0])
            return tensors[0] if tensors[0].is_meta else tensors[0].fill_(1.0)
        is_pinned = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        if is_pinned:
            self.pinned.add(result.untyped_storage()._cdata)
        return result

    def _check_copy(self, into: Tensor | None, source: Tensor, non_blocking: bool) -> None:
        host = into if source.is_meta else source
        if into is not None and source.ndim == 0 and not source.is_meta:
            return  # an argument of a kernel
        if host is None or host.untyped_storage()._cdata not in self.pinned or not non_blocking:
            raise Synchronization(f"a copy of {tuple(source.shape)} from {source.device}")


def _has_mask_index(func: Any, args: Any) -> bool:
    if func._opname not in ("index", "index_put_", "index_put", "_index_put_impl_"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


@contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    gpu = SimulatedGpu()

    def pin(tensor: Tensor) -> Tensor:  # in the loader's thread
        pinned = tensor.clone()
        gpu.pinned.add(pinned.untyped_storage()._cdata)
        kept.append(pinned)  # so that no other tensor gets its storage
        return pinned

    def wait(_: torch.device) -> None:
        gpu.num_waits += 1

    def tensor(*args: Any, **kwargs: Any) -> Tensor:  # from a list; no operation shows its copy
        if kwargs.get("device") == GPU:
            raise Synchronization("torch.tensor")
        return make_tensor(*args, **kwargs)

    kept: list[Tensor] = []
    make_tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr("parallel.collectives.synchronize", wait)
    adam = sys.modules["torch.optim.adam"]  # torch.optim does not have it as an attribute
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setitem(_CHUNK_ELEMENTS, "meta", _CHUNK_ELEMENTS["cuda"])
    with gpu:
        yield gpu


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("config=llama_debug.yaml", "parallel.recompute_granularity=selective"),
        ("data.inter_document_masking=true", "parallel.recompute_granularity=full"),
        ("model.attention_dropout=0.1", "train.z_loss_coeff=1e-4"),
        ("optimizer.name=muon",),
    ],
    ids=["gpt", "llama", "documents", "attention dropout", "muon"],
)
@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_waits_once(
    monkeypatch: pytest.MonkeyPatch, tp: int, options: tuple[str, ...]
) -> None:
    """Two micro-batches of the real loader: no implicit synchronization, and one explicit wait."""
    small = ("train.global_batch_size=4", "train.micro_batch_size=2", "model.seq_length=32")
    layout = f"parallel.tensor_model_parallel_size={tp}"
    config = parse_config(["config=gpt_debug.yaml", layout, *small, *options], lambda _: tp)
    with fake_mesh(tp, tp, True, "backward") as cpu_mesh:
        mesh = replace(cpu_mesh, device=GPU)
        model = build_meta_model(config, mesh)
        corpus = corpus_of(config)
        run = SimpleNamespace(config=config, mesh=mesh, model=model, corpus=corpus)
        with simulated_gpu(monkeypatch) as gpu:
            run.optimizer = build_optimizer(model, config.optimizer)
            state = RunState(wandb_id="none")
            with BatchLoader(
                corpus,
                config,
                consumed_samples=0,
                first_step=0,
                dp_rank=0,
                dp_size=1,
                tp_size=tp,
                device_is_cuda=True,
            ) as batches:
                result = train_step(cast(Run, run), state, batches)
    assert result.why_skipped is None
    assert gpu.num_waits == 1


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + torch.ones(2).to(GPU),
        lambda x: torch.ones(2).to(GPU, non_blocking=True),
        lambda x: x.copy_(torch.ones(2), non_blocking=True),
        lambda x: torch.empty(2).copy_(x, non_blocking=True),
    ],
)
def test_implicit_waits_are_detected(monkeypatch: pytest.MonkeyPatch, wait: Any) -> None:
    """Host reads, data-dependent shapes, and copies from pageable memory are detected."""
    with simulated_gpu(monkeypatch), pytest.raises(Synchronization):
        wait(torch.ones(2, device=GPU))
