"""One training step as one rank would run it, without the other ranks and without memory.

It runs train.py's own code: model, FSDP2, loss, gradients, optimizer. Tensors have shapes but no
contents (torch's FakeTensorMode on a CPU), and collectives return at once. Memory and collectives
are recorded, not derived from formulas. Unless train.device is cpu, it stands for a GPU, which
multiplies bfloat16 without float32 copies and has larger chunks of the loss.

M is the bytes of a full tensor, see [Note: bytes on a ring] in parallel/transport/traffic.py.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from configs import Config
from data.loader import BatchLoader, StepBatch
from data.rows import MicroBatch
from model import GPT, build_meta_model
from ops.balance import width_multiple
from ops.dropout import dropout_keys
from ops.matmul import Precision, use_precision
from ops.torch_dry_run import FakeTensorMode, call_after_backward
from parallel import Losses, Mesh, local_shards, max_alive
from parallel.transport.traffic import Collective, fake_mesh, record_traffic
from planning.memory_log import Allocation, MemoryLog
from training.optimizer import WEIGHTS, build_optimizer, training_tensors
from training.state import Run, RunState
from training.step import train_step

BEFORE, FORWARD, BACKWARD, AFTER = "before", "forward", "backward", "after"


class StateSize(NamedTuple):
    """Bytes that a rank holds of the weights, the gradients or the optimizer state."""

    total: int
    of_layer: int  # each layer


class SavedTensors(NamedTuple):
    """Tensors of one shape that a module saves for backward."""

    module: str  # relative to its layer
    dtype: torch.dtype
    shape: tuple[int, ...]
    number: int
    num_bytes: int  # all of them


@dataclass(frozen=True)
class StepReport:
    """Memory and traffic in one step, of the rank of a stage that has the most of both."""

    tp: tuple[int, ...]  # the ranks on each of this rank's axes
    cp: tuple[int, ...]
    dp_cp: tuple[int, ...]  # dp and cp together
    shard: tuple[int, ...]  # those of dp_cp over which FSDP2 shards
    replicas: tuple[int, ...]  # those of dp_cp with the same shards (HSDP)
    pp: tuple[int, ...]
    stage: int  # this rank's
    layers: tuple[int, ...]  # of the stage
    num_parameters: int  # of the stage, on all its ranks
    max_alive: int  # the most micro-batches, per chunk of layers, that await their backward
    sequence_parallel: bool
    num_micro_batches: int
    state: dict[str, StateSize]  # of weights, gradients (as the optimizer gets them), moments
    saved_in_layer: list[SavedTensors]
    saved_elsewhere: list[SavedTensors]
    saved_bytes: int  # of one micro-batch, in all
    peak: dict[str, int]  # bytes of each kind at the peak
    peak_phase: str
    traffic: dict[str, Counter[Collective]]  # by axis and part of a step, in order
    step: Counter[Collective]  # the whole step

    @property
    def peak_bytes(self) -> int:
        """Bytes allocated at the peak."""
        return sum(self.peak.values())


class _Sent(NamedTuple):
    collective: Collective
    micro_batch: int
    phase: str
    layer: int | None  # None: outside layers

    def is_message(self, pp: tuple[int, ...]) -> bool:
        """Whether it is between stages of a pipeline."""
        return self.collective.kind in ("send", "recv") and self.collective.ranks == pp


class _Span(NamedTuple):
    phase: str  # of one micro-batch
    begin: int  # instants of the memory log
    end: int


class StepTracer:
    """Hooks that record where in a step each collective and each allocation belongs."""

    def __init__(self, model: GPT, memory: MemoryLog, traffic: list[Collective]) -> None:
        self.memory, self._traffic = memory, traffic
        self.sent: list[_Sent] = []
        self.spans: list[_Span] = []
        self._micro_batch, self._phase, self._layer = 0, BEFORE, cast(int | None, None)
        self._span_begin = memory.now
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            # Always: torch ends a recomputed forward early with an exception.
            module.register_forward_hook(self._leave, always_call=True)
        for number, block in zip(_layers(model), model.blocks, strict=True):
            block.register_forward_pre_hook(partial(self._enter_layer, number))
            block.register_forward_hook(partial(self._leave_layer, number))
        model.register_forward_pre_hook(self._enter_model, with_kwargs=True)
        model.register_forward_hook(self._leave_model)

    def begin(self, micro_batch: int) -> None:
        """Follow the forward of a micro-batch, and its backward when that comes."""
        self.move_to(FORWARD)
        self._micro_batch = micro_batch

    def move_to(self, phase: str, layer: int | None = None) -> None:
        """Record the collectives since the last call, then enter another part of the step."""
        new = self._traffic[len(self.sent) :]
        self.sent += [_Sent(one, self._micro_batch, self._phase, self._layer) for one in new]
        self._phase, self._layer = phase, layer

    def max_alive(self) -> int:
        """Return the largest number of forwards whose backward had not ended."""
        changes = (1 if span.phase == FORWARD else -1 for span in self.spans)
        return max(itertools.accumulate(changes))

    def _end_span(self, phase: str, next_phase: str) -> None:
        self.move_to(next_phase)
        self.spans.append(_Span(phase, self._span_begin, self.memory.now))
        self._span_begin = self.memory.now

    def _enter_model(self, _: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        if inputs["x"] is not None:
            self._note_message(inputs["x"])
            inputs["x"].register_hook(self._note_message)

    def _leave_model(self, _: nn.Module, __: Any, output: Losses | Tensor) -> None:
        self._end_span(FORWARD, BACKWARD)
        if isinstance(output, Tensor):
            self._note_message(output)
            output.register_hook(self._note_message)
        else:
            output = output.objective
        output.register_hook(partial(self._begin_backward, self._micro_batch))

    def _begin_backward(self, micro_batch: int, _: Tensor) -> None:
        self.move_to(BACKWARD, self._layer)
        self._micro_batch = micro_batch
        call_after_backward(partial(self._end_span, BACKWARD, AFTER))

    def _note_message(self, tensor: Tensor) -> None:
        self.memory.allocation_of(tensor).is_message = True

    def _enter(self, name: str, *_: Any) -> None:
        self.memory.modules.append(name)

    def _leave(self, *_: Any) -> None:
        self.memory.modules.pop()

    def _enter_layer(self, number: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.move_to(FORWARD, number)
        # Backward computes the gradient of a layer's input last.
        inputs[0].register_hook(lambda _: self.move_to(BACKWARD))

    def _leave_layer(self, number: int, _: nn.Module, __: Any, output: Tensor) -> None:
        self.move_to(FORWARD)
        output.register_hook(lambda _: self.move_to(BACKWARD, number))


class _TracedList(list[MicroBatch]):
    """Micro-batches that tell a tracer when a step begins one."""

    tracer: StepTracer

    def __getitem__(self, number: Any) -> Any:
        self.tracer.begin(number)
        return super().__getitem__(number)


def dry_run(
    config: Config, num_ranks: int, num_traced: int | None = None, stage: int = 0
) -> StepReport:
    """Run one step as the first rank of a stage of `num_ranks` ranks.

    `num_traced`: micro-batches to run; None: as few as represent all. Raises RuntimeError if this
    process has joined a process group.
    """
    parallel, train = config.parallel, config.train
    size, per_replica = parallel.tensor_model_parallel_size, parallel.ranks_per_replica
    num_stages = parallel.pipeline_model_parallel_size
    num_chunks = parallel.virtual_pipeline_model_parallel_size or 1
    per_stage = num_ranks // num_stages
    rank = stage * per_stage
    tp = tuple(range(rank, rank + size))
    cp = tuple(range(rank, rank + per_replica // num_stages, size))
    dp_cp = tuple(range(rank, rank + per_stage, size))
    shard = dp_cp[: len(dp_cp) // parallel.data_parallel_replicate_size]
    replicas = dp_cp[:: len(shard)]
    pp = tuple(range(0, num_ranks, per_stage))
    num_micro_batches = train.global_batch_size // (
        train.micro_batch_size * (num_ranks // per_replica)
    )
    # The micro-batches of a step are alike except the last, and the first if it gathers weights for
    # all of them. A stage of a pipeline needs three more than it keeps alive: two whose gradients
    # are sent but not received, and one whose input is received meanwhile.
    reshards = parallel.reshard_after_forward and num_stages == 1
    typical = 1 if len(dp_cp) > 1 and not reshards else 0
    alive = max_alive(num_stages, 1, stage) if num_chunks == 1 else 2 * num_stages
    needed = alive + 3 if num_stages > 1 else typical + 2
    num_traced = min(num_traced or needed, num_micro_batches)
    typical = min(typical, num_traced - 1)
    is_gpu = config.train.device != "cpu"
    with (
        _no_widening() if is_gpu else nullcontext(),
        fake_mesh(
            num_ranks,
            size,
            parallel.sequence_parallel,
            parallel.tp_comm_overlap,
            rank,
            context_parallel_size=parallel.context_parallel_size,
            data_parallel_replicate_size=parallel.data_parallel_replicate_size,
            cp_comm_type=parallel.cp_comm_type,
            pipeline_model_parallel_size=num_stages,
            num_chunks=num_chunks,
            kernels="cuda" if is_gpu else "cpu",
        ) as mesh,
    ):
        tracer, layers, tensors = _trace_step(config, mesh, num_traced)
    memory, first_forward = tracer.memory, tracer.spans[0]
    layer = layers[len(layers) // 2]  # FSDP2 treats the first and the last one differently
    kinds, state = dict[Allocation, str](), dict[str, StateSize]()
    for kind, named in tensors.items():
        local = {name: shard.tensor for name, shard in named.items()}
        kinds |= {memory.allocation_of(tensor): kind for tensor in local.values()}
        of_layer = sum(t.nbytes for name, t in local.items() if f"blocks.{layer}." in name)
        state[kind] = StateSize(sum(t.nbytes for t in local.values()), of_layer)
    saved = {
        allocation: num_bytes
        for allocation, num_bytes in memory.live(first_forward.end).items()
        if allocation.begin >= first_forward.begin
        and not (allocation in kinds or allocation.is_weight_copy or allocation.is_message)
    }
    peak, peak_phase = _peak(tracer, kinds)
    messages = [one for one in tracer.sent if one.is_message(pp)]
    others = [one for one in tracer.sent if not one.is_message(pp)]
    of_micro_batch = {
        one: count // num_traced for one, count in Counter(m.collective for m in messages).items()
    }
    step = Counter({one: count * num_micro_batches for one, count in of_micro_batch.items()})
    for one in others:
        is_repeated = one.phase in (FORWARD, BACKWARD) and one.micro_batch == typical
        step[one.collective] += num_micro_batches - num_traced + 1 if is_repeated else 1
    traffic = {"pp  one micro-batch": Counter(of_micro_batch)} if messages else {}
    traffic |= _traffic(others, tp, cp, shard, replicas, layer, (typical, num_traced - 1))
    return StepReport(
        tp=tp,
        cp=cp,
        dp_cp=dp_cp,
        shard=shard,
        replicas=replicas,
        pp=pp,
        stage=stage,
        layers=layers,
        num_parameters=sum(math.prod(one.global_shape) for one in tensors["weights"].values()),
        max_alive=tracer.max_alive(),
        sequence_parallel=mesh.sequence_parallel,
        num_micro_batches=num_micro_batches,
        state=state,
        saved_in_layer=_by_shape(saved, f"blocks.{layer}."),
        saved_elsewhere=_by_shape({a: n for a, n in saved.items() if "blocks." not in a.module}),
        saved_bytes=sum(saved.values()),
        peak=peak,
        peak_phase=peak_phase,
        traffic=traffic,
        step=step,
    )


@contextmanager
def _no_widening() -> Iterator[None]:
    """Compute in bfloat16, as GPUs do: see [Note: widening] in ops/matmul.py."""
    previous = use_precision(Precision("native", "native"))
    try:
        yield
    finally:
        use_precision(previous)


def _trace_step(
    config: Config, mesh: Mesh, num_traced: int
) -> tuple[StepTracer, tuple[int, ...], dict[str, dict[str, Any]]]:
    """Run the step; return its tracer, its layers, and the tensors of each kind, by name."""
    model = build_meta_model(config, mesh)  # outside the fake mode, where FSDP2 cannot read a mesh
    with (
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        record_traffic() as traffic,
        MemoryLog(fake) as memory,
    ):
        model.to_empty(device=mesh.device)
        optimizer = build_optimizer(model, config.optimizer)
        tensors: dict[str, dict[str, Any]] = {"weights": {}, "gradients": {}, "moments": {}}
        for name, tensor in training_tensors(model, optimizer).items():
            tensors["weights" if name.startswith(WEIGHTS) else "moments"][name] = tensor
        for shard in local_shards(model).values():
            memory.allocation_of(shard.tensor).is_weight = True

        def note_gradients(*_: Any) -> None:
            tensors["gradients"] |= local_shards(model, lambda p: p.grad)

        optimizer.register_step_pre_hook(note_gradients)
        tracer = StepTracer(model, memory, traffic)
        micro_batch = _full_micro_batch(config)
        micro_batches = _TracedList([micro_batch] * num_traced)
        micro_batches.tracer = tracer
        batch = StepBatch(micro_batches, micro_batch.num_targets * num_traced, sum_of_lengths=0)
        run = SimpleNamespace(config=config, mesh=mesh, model=model, optimizer=optimizer)
        train_step(cast(Run, run), RunState(wandb_id=""), cast(BatchLoader, iter([batch])))
        tracer.move_to(AFTER)
    return tracer, _layers(model), tensors


def _layers(model: GPT) -> tuple[int, ...]:
    return tuple(cast(int, block.layer) for block in model.blocks)


def _full_micro_batch(config: Config) -> MicroBatch:
    """Make full rows of one document, with a target at every position."""
    parallel, b = config.parallel, config.train.micro_batch_size
    multiple = width_multiple(parallel.context_parallel_size, parallel.tensor_model_parallel_size)
    width = config.model.seq_length + -config.model.seq_length % multiple
    tokens = torch.zeros(b, width, dtype=torch.int64)
    return MicroBatch(
        tokens=tokens,
        targets=tokens,
        positions=tokens,
        sample_indices=torch.arange(b),
        num_targets=b * width,
        dropout_keys=dropout_keys(0, 0, range(b), config.model.num_layers),
    ).of_cp_rank(0, parallel.context_parallel_size)


def _by_shape(saved: dict[Allocation, int], prefix: str = "") -> list[SavedTensors]:
    """Group the allocations of the modules below a prefix by module, dtype and shape."""
    groups: dict[tuple[str, torch.dtype, tuple[int, ...]], list[int]] = {}
    for allocation, num_bytes in saved.items():
        if f"{allocation.module}.".startswith(prefix):
            key = allocation.module[len(prefix) :], allocation.dtype, allocation.shape
            groups.setdefault(key, []).append(num_bytes)
    return [SavedTensors(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()]


def _peak(tracer: StepTracer, kinds: dict[Allocation, str]) -> tuple[dict[str, int], str]:
    """Return the bytes of each kind when most is allocated, and the phase of that instant."""
    memory, instant = tracer.memory, tracer.memory.peak()
    left_behind: dict[str, set[Allocation]] = {FORWARD: set(), BACKWARD: set()}
    for span in tracer.spans:
        left_behind[span.phase] |= {a for a in memory.live(span.end) if a.begin >= span.begin}
    order = ("weights", "moments", "gradients", "weight copies", "unsharded gradients")
    peak = dict.fromkeys((*order, "saved activations", "messages", "temporary"), 0)
    for allocation, num_bytes in memory.live(instant).items():
        if allocation in kinds:
            kind = kinds[allocation]
        elif allocation.is_weight_copy:
            kind = "weight copies"
        elif allocation.is_message:
            kind = "messages"
        elif allocation in left_behind[BACKWARD]:
            kind = "unsharded gradients"
        else:
            kind = "saved activations" if allocation in left_behind[FORWARD] else "temporary"
        peak[kind] += num_bytes
    return peak, next((span.phase for span in tracer.spans if instant <= span.end), AFTER)


def _traffic(
    sent: Iterable[_Sent],
    tp: tuple[int, ...],
    cp: tuple[int, ...],
    shard: tuple[int, ...],
    replicas: tuple[int, ...],
    layer: int,
    typical_and_last: tuple[int, int],
) -> dict[str, Counter[Collective]]:
    """Split the traffic by axis and part of a micro-batch, and into what is sent once per step."""

    def count(
        ranks: tuple[int, ...], *place: str | int, of: tuple[Any, ...]
    ) -> Counter[Collective]:
        return Counter(
            one.collective
            for one in sent
            if (one.collective.ranks, one.phase, one.micro_batch) == (ranks, *place)
            and (one.layer in of or not of)
        )

    parts = {
        f"tp  {where}, {phase}": count(tp, phase, 0, of=(number,))
        for where, number in (("one layer", layer), ("outside layers", None))
        for phase in (FORWARD, BACKWARD)
    }
    typical, last = typical_and_last
    # FSDP2 communicates between layers; with dp = 1 its ranks are also those of cp.
    fsdp, outside = ("fsdp", (None,)) if len(cp) > 1 else ("dp", ())
    if len(cp) > 1:
        for phase in (FORWARD, BACKWARD):
            parts[f"cp  one layer, {phase}"] = count(cp, phase, typical, of=(layer,))
    for phase in (FORWARD, BACKWARD):
        usual = count(shard, phase, typical, of=outside)
        parts[f"{fsdp}  one micro-batch, {phase}"] = usual
        for place, number in (("first", 0), ("last", last)):
            if (unusual := count(shard, phase, number, of=outside)) != usual:
                parts[f"{fsdp}  the {place} one, {phase}"] = unusual
    if len(replicas) > 1:
        parts["replicas  the last one, backward"] = count(replicas, BACKWARD, last, of=())
    once = Counter(one.collective for one in sent if one.phase in (BEFORE, AFTER))
    return parts | {"any once per step": once}
