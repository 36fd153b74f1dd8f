"""One training step as rank 0 would do it, without the other ranks and without memory.

The code that runs is train.py's own: model, FSDP2, loss, gradients, AdamW. Tensors have shapes and
no contents (torch's FakeTensorMode, on a processor), collectives return at once, and numbers that
the step reads from tensors are 0. So what it holds and sends follows, whatever the code is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from configs import Config
from data import BatchLoader, MicroBatch, StepBatch
from model import GPT, build_meta_model
from parallel import Mesh
from parallel.traffic import Collective, fake_mesh, record_traffic
from planning.memory_log import MemoryLog, Piece
from training.optimizer import build_optimizer, training_tensors
from training.state import Run, RunState
from training.step import train_step

# Where a step is: before its micro-batches, in forward or backward of one, or after all of them.
BEFORE, FORWARD, BACKWARD, AFTER = "before", "forward", "backward", "after"


@dataclass(frozen=True)
class Sent:
    """A collective, and where in the step it was issued."""

    collective: Collective
    micro_batch: int  # from 0
    phase: str
    layer: int | None  # None: outside of the layers


@dataclass(frozen=True)
class Tensors:
    """Those of one kind that a rank has all the time, or when it updates its weights."""

    of_rank: int  # bytes
    of_layer: int  # bytes, of each layer
    pieces: frozenset[Piece]  # of the log


@dataclass(frozen=True)
class DryRun:
    """What was seen of a step of `num_rehearsed` micro-batches."""

    tp: tuple[int, ...]  # the ranks of this rank's axes
    dp: tuple[int, ...]
    sequence_parallel: bool
    num_rehearsed: int
    sent: list[Sent]
    memory: MemoryLog
    weights: Tensors
    moments: Tensors
    gradients: Tensors  # as AdamW is given them
    started_at: int  # an instant of the log
    ends: dict[tuple[int, str], int]  # those at which (micro-batch, phase) ended


class _Watch:
    """Follows a model through a step by hooks: what is sent where, what is held when."""

    def __init__(self, model: GPT, memory: MemoryLog, traffic: list[Collective]) -> None:
        self.memory, self.traffic = memory, traffic
        self.sent: list[Sent] = []
        self.ends: dict[tuple[int, str], int] = {}
        self.micro_batch, self.phase = 0, BEFORE
        self.layer: int | None = None
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self.enter, name))
            # Also if the forward is broken off, as torch does with a recomputation.
            module.register_forward_hook(self.leave, always_call=True)
        for number, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(self.enter_layer, number))
            block.register_forward_hook(partial(self.leave_layer, number))
        model.register_forward_hook(lambda *_: self.end(FORWARD, then=BACKWARD))

    def go_to(self, phase: str, layer: int | None = None) -> None:
        """What was sent since the last call belongs to where the step was until now."""
        new = self.traffic[len(self.sent) :]
        self.sent += [Sent(one, self.micro_batch, self.phase, self.layer) for one in new]
        self.phase, self.layer = phase, layer

    def begin(self, micro_batch: int) -> None:
        """A micro-batch begins."""
        self.go_to(FORWARD)
        self.micro_batch = micro_batch

    def end(self, phase: str, then: str) -> None:
        """A phase of a micro-batch is done."""
        self.go_to(then)
        self.ends[self.micro_batch, phase] = self.memory.now

    def enter(self, name: str, *_: Any) -> None:
        """A forward pre-hook of a module."""
        self.memory.places.append(name)

    def leave(self, *_: Any) -> None:
        """A forward hook of a module."""
        self.memory.places.pop()

    def enter_layer(self, number: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook of a block."""
        self.go_to(FORWARD, number)
        # The gradient of a layer's input is the last thing that its backward works out.
        inputs[0].register_hook(lambda _: self.go_to(BACKWARD))

    def leave_layer(self, number: int, _: nn.Module, __: Any, output: Tensor) -> None:
        """A forward hook of a block."""
        self.go_to(FORWARD)
        output.register_hook(lambda _: self.go_to(BACKWARD, number))


class _Watched(list[MicroBatch]):
    """Micro-batches of which a watch is told when a step takes one up and when it is done."""

    def __init__(self, micro_batches: Sequence[MicroBatch], watch: _Watch) -> None:
        super().__init__(micro_batches)
        self.watch = watch

    def __iter__(self) -> Iterator[MicroBatch]:
        for number, micro_batch in enumerate(super().__iter__()):
            self.watch.begin(number)
            yield micro_batch
            self.watch.end(BACKWARD, then=AFTER)


class _Zeros(TorchDispatchMode):
    """Numbers that are read from pretended tensors are 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func is torch.ops.aten._local_scalar_dense.default
        if reads and isinstance(args[0], FakeTensor):
            return 0.0 if args[0].is_floating_point() else 0
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Trainee:
    """All that a step asks of a Run; there is no run folder and no text."""

    config: Config
    mesh: Mesh
    model: GPT
    optimizer: AdamW


@contextmanager
def _without_memory() -> Iterator[FakeTensorMode]:
    """Tensors made inside have no contents; what would be compiled runs as it is written."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.compiler.set_stance("force_eager"), fake, _Zeros():
        yield fake


def dry_run(config: Config, num_ranks: int, num_micro_batches: int) -> DryRun:
    """One step of rank 0 of `num_ranks`; where pieces are uneven, no other rank has more."""
    parallel = config.parallel
    size = parallel.tensor_model_parallel_size
    layout = (size, parallel.sequence_parallel, parallel.tp_comm_overlap)
    with fake_mesh(num_ranks, *layout) as mesh:
        # On the meta device: FSDP2 looks its mesh up, which tensors without contents cannot tell.
        model = build_meta_model(config, mesh)
        with _without_memory() as fake, record_traffic() as traffic, MemoryLog(fake) as memory:
            model.to_empty(device=mesh.device)
            optimizer = build_optimizer(model, config.optimizer)
            state = training_tensors(model, optimizer)
            gradients: dict[str, Tensor | None] = {}
            optimizer.register_step_pre_hook(
                lambda *_: gradients.update({n: p.grad for n, p in model.named_parameters()})
            )
            watch, started_at = _Watch(model, memory, traffic), memory.now
            micro_batch = _full_micro_batch(config)
            micro_batches = _Watched([micro_batch] * num_micro_batches, watch)
            batches = iter([StepBatch(micro_batches, micro_batch.num_targets * num_micro_batches)])
            run = cast(Run, _Trainee(config, mesh, model, optimizer))
            train_step(run, RunState(wandb_id=""), cast(BatchLoader, batches))
            watch.go_to(AFTER)
            of_weights = {n: t for n, t in state.items() if n.startswith("parameters.")}
            of_moments = {n: t for n, t in state.items() if n not in of_weights}
            return DryRun(
                tp=tuple(range(size)),
                dp=tuple(range(0, num_ranks, size)),
                sequence_parallel=mesh.sequence_parallel,
                num_rehearsed=num_micro_batches,
                sent=watch.sent,
                memory=memory,
                weights=_tensors(of_weights, memory),
                moments=_tensors(of_moments, memory),
                gradients=_tensors(gradients, memory),
                started_at=started_at,
                ends=watch.ends,
            )


def _full_micro_batch(config: Config) -> MicroBatch:
    """Rows as long as the data makes them, all of whose targets count."""
    t, b = config.parallel.tensor_model_parallel_size, config.train.micro_batch_size
    width = config.model.seq_length + -config.model.seq_length % t
    tokens = torch.zeros(b, width, dtype=torch.int64)
    keeps_apart = config.data.inter_document_masking and config.data.sequence_mode == "pack"
    return MicroBatch(
        tokens=tokens,
        targets=tokens,
        positions=tokens,
        sample_indices=torch.arange(b),
        num_targets=b * width,
        documents=tokens if keeps_apart else None,
    )


def _tensors(named: dict[str, Any], memory: MemoryLog) -> Tensors:
    """Tensors by name, some of them those of layers, `blocks.N.`."""
    local: dict[str, Tensor] = {}
    for name, tensor in named.items():
        assert isinstance(tensor, DTensor), f"{name} is {type(tensor)}"
        local[name] = tensor.to_local()
    of_layer = sum(tensor.nbytes for name, tensor in local.items() if "blocks.0." in name)
    return Tensors(
        sum(tensor.nbytes for tensor in local.values()),
        of_layer,
        frozenset(memory.piece_of(tensor) for tensor in local.values()),
    )
