"""What a training step communicates, and when the host waits for its result."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config, parse_config
from parallel import Mesh
from parallel.transport.traffic import Collective, record_traffic
from tests.data.test_loader import LENGTHS, mixed_corpus, steps
from tests.data_corpora import corpus_of_lengths
from tests.distributed import ONE_RANK, TENSOR_PARALLEL, Layout, distributed
from tests.model.test_gpt import OPTIONS, STREAM, TINY, batch, tiny_model
from tests.runs import settings
from train import start
from training.run_folder import RunFolder
from training.signals import StopSignals
from training.state import training_batches
from training.step import train_step

# Operations for which the host waits for a GPU: they return a number, or a size that it decides.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}


class _Recorder(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(argument_type, DTensor) for argument_type in types):
            return NotImplemented  # it runs on plain tensors, which come here again
        if func._opname in WAITS:
            self.reads.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Yield a list to which each read of a tensor's values by this thread is appended."""
    reads: list[str] = []
    tolist, thread = Tensor.tolist, threading.current_thread()

    def recorded(tensor: Tensor) -> Any:
        if threading.current_thread() is thread:
            reads.append("tolist")
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch, _Recorder(reads):
        patch.setattr(Tensor, "tolist", recorded)
        yield reads


@distributed(ONE_RANK, *TENSOR_PARALLEL[:2], Layout(tp=2, overlap="backward"), Layout(dp=2))
@pytest.mark.parametrize("options", ["gpt2", "llama"])
def test_the_model_reads_no_values_on_the_host(mesh: Mesh, options: str) -> None:
    """The host reads no tensor values in forward or backward."""
    model = tiny_model(mesh, dataclasses.replace(TINY, **OPTIONS[options]))
    with host_reads() as reads:
        model(*batch(), STREAM).objective.backward()
    assert reads == []


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """Two micro-batches on one dp rank of two."""
    return parse_config(settings(corpus, tmp_path))


@distributed(Layout(tp=2), Layout(dp=2))
def test_a_step_waits_once(mesh: Mesh, config: Config) -> None:
    """One all-reduce on the host decides the update: two losses, norm, lengths, five signals.

    With tensor parallelism there is another one on the device, for partial gradients.
    """
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=mesh.tp.size)
    config = dataclasses.replace(config, parallel=parallel)
    signals = StopSignals()
    with RunFolder(config, mesh) as folder:
        run, state = start(config, mesh, folder)
        with training_batches(run, state) as batches:
            state = state.advance(train_step(run, state, batches, signals), 8)
            with record_traffic() as traffic, host_reads() as reads:
                result = train_step(run, state, batches, signals)
    assert result.why_skipped is None
    assert result.grad_norm > config.optimizer.clip_grad > 0  # it clips
    control = Collective("all_reduce", (0, 1), torch.float64, 8 * 9)
    *partial, last = [collective for collective in traffic if collective.kind == "all_reduce"]
    assert (last, traffic[-1]) == (control, control)
    assert [collective.dtype for collective in partial] == [torch.float32] * (mesh.tp.size - 1)
    assert {c.kind for c in traffic} == {"all_gather", "reduce_scatter", "all_reduce"}
    # The number of a micro-batch's first sample is not on the device.
    num_micro_batches = 8 // mesh.dp.size // config.train.micro_batch_size
    assert reads == ["_local_scalar_dense"] * num_micro_batches + ["tolist"]


@pytest.mark.parametrize(
    ("mode", "masked"),
    [("stream", False), ("stream", True), ("best_fit", False), ("best_fit", True), ("pad", False)],
)
@pytest.mark.parametrize("is_mixture", [False, True])
def test_every_rank_counts_all_targets(mode: str, masked: bool, is_mixture: bool) -> None:
    """A loader counts the targets of the global batch but reads only its own rows."""
    corpus = mixed_corpus() if is_mixture else corpus_of_lengths(LENGTHS)
    for dp_size in (1, 2, 3):
        ranks = [
            steps(
                corpus,
                9,
                mode=mode,
                inter_document_masking=masked,
                micro_batch_size=2,
                dp_rank=dp_rank,
                dp_size=dp_size,
                first_step=0,
            )
            for dp_rank in range(dp_size)
        ]
        for step in zip(*ranks, strict=True):
            micro_batches = [micro for of_rank in step for micro in of_rank.micro_batches]
            counts = [int((micro.targets >= 0).sum()) for micro in micro_batches]
            assert counts == [micro.num_targets for micro in micro_batches]
            assert [of_rank.num_targets for of_rank in step] == [sum(counts)] * dp_size
