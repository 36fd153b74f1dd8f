"""Pipeline parallelism: the stages of a model, and the order in which they work.

[Note: pipeline]
The layers are cut into p v pieces. Stage r of p stages holds the pieces r, p + r, 2 p + r, ... as
its v chunks; v is 1 except in the interleaved schedule. The activations `[s/t, b, h]` of a
micro-batch pass through the pieces, and their gradients come back. With sequence parallelism each
tp rank sends its own shard to its counterpart.

A stage alternates between forward and backward (1F1B; Narayanan et al. 2021, section 2.2), so that
stage r keeps the activations of p - r micro-batches at most, however many there are. It is idle
for (p - 1) / (m v + p - 1) of a step of m micro-batches: the bubble.

Every chunk runs backward in the order of the micro-batches, so each gradient is the same sum as on
one stage, bit for bit. Only a tied table's, summed in two parts, rounds differently.

[Note: messages]
Sends do not block, and a stage receives its next input while it computes. NCCL runs the operations
of a rank in one process group one after the other, so a send would wait for an earlier receive. So
the activations and the gradients of a stage's two links have a group each: there messages flow one
way, between two stages, in the order in which both need them, and no two operations can wait for
each other. Every stage reads the same batch and knows the shapes.

On a GPU a receive is posted only when its message is needed next. It is a kernel that waits on the
device, and a wait for the whole device (to compile, to allocate) would not end if the message came
of work that has not been queued yet. The CPU runs ahead of the GPU, so it is posted early enough.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.collectives import Pending
from parallel.mesh import Mesh, link_kind

Output = TypeVar("Output")

_BACKWARD_TIME = 2  # in forwards; only affects the order
# Sends to one stage that may be outstanding; each keeps its tensor alive.
MAX_PENDING = 2


class Action(NamedTuple):
    """The forward or backward of one micro-batch through one chunk of a stage."""

    is_forward: bool
    micro_batch: int
    chunk: int


def max_alive(num_stages: int, num_chunks: int, stage: int) -> int:
    """The most forwards that a stage may be ahead of its backwards; Megatron-LM's number."""
    after = num_stages - stage - 1
    return after + 1 if num_chunks == 1 else 2 * after + (num_chunks - 1) * num_stages + 1


@cache
def schedule(
    num_micro_batches: int, num_stages: int, num_chunks: int = 1
) -> tuple[tuple[Action, ...], ...]:
    """The actions of each stage, in order; a function of the arguments, so all ranks agree.

    Forwards go through chunk 0 with p micro-batches, then through chunk 1, and so on; backwards
    through the last chunk first. A simulation decides how they alternate: a stage runs a backward
    if its input has arrived, else a forward unless `max_alive` micro-batches are alive.
    """
    p = num_stages
    pairs = [(n, chunk) for n in range(num_micro_batches) for chunk in range(num_chunks)]
    forwards = sorted(pairs, key=lambda pair: (pair[0] // p, pair[1], pair[0]))
    backwards = sorted(pairs, key=lambda pair: (pair[0] // p, -pair[1], pair[0]))
    last_piece = p * num_chunks - 1
    ends: dict[tuple[bool, int, int], int] = {}  # of (is_forward, micro-batch, piece)
    actions: list[list[Action]] = [[] for _ in range(p)]
    num_done = [[0, 0] for _ in range(p)]  # backwards and forwards of each stage
    free_at = [0] * p

    def is_ready(stage: int, action: Action) -> bool:
        is_forward, n, chunk = action
        piece = chunk * p + stage
        if is_forward:
            num_alive = num_done[stage][True] - num_done[stage][False]
            if num_alive == max_alive(p, num_chunks, stage):
                return False
            return piece == 0 or ends.get((True, n, piece - 1), now + 1) <= now
        before = (True, n, piece) if piece == last_piece else (False, n, piece + 1)
        return ends.get(before, now + 1) <= now

    now = 0
    while any(done[False] < len(pairs) for done in num_done):
        for stage, done in enumerate(num_done):
            candidates = [
                Action(is_forward, *order[done[is_forward]])
                for is_forward, order in ((False, backwards), (True, forwards))
                if done[is_forward] < len(order)
            ]
            action = next((one for one in candidates if is_ready(stage, one)), None)
            if free_at[stage] <= now and action is not None:
                free_at[stage] = now + (1 if action.is_forward else _BACKWARD_TIME)
                piece = action.chunk * p + stage
                ends[action.is_forward, action.micro_batch, piece] = free_at[stage]
                actions[stage].append(action)
                done[action.is_forward] += 1
        assert any(time > now for time in free_at), "no stage can continue"
        now += 1
    return tuple(map(tuple, actions))


def run_pipeline(
    mesh: Mesh,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    forward: Callable[[int, int, Tensor | None], Tensor],
    before_backward: Callable[[int, int], None],
) -> None:
    """Run forward and backward of all micro-batches on this stage.

    `shapes` has the shape of each micro-batch's activations on this rank. `forward(micro_batch,
    chunk, x)` returns the activations for the next piece of the model, or on the last piece the
    scalar to differentiate; x is None on the first piece.
    """
    actions = schedule(len(shapes), mesh.pp.size, mesh.num_chunks)[mesh.pp.rank]
    links = _Links(mesh, actions, shapes, dtype)
    alive: dict[tuple[int, int], tuple[Tensor | None, Tensor | GradientEdge]] = {}
    for is_forward, micro_batch, chunk in actions:
        if is_forward:
            x = None if _is_first(mesh, chunk) else links.inputs.receive().requires_grad_()
            y = forward(micro_batch, chunk, x)
            if _is_last(mesh, chunk):
                alive[micro_batch, chunk] = x, y
            else:
                alive[micro_batch, chunk] = x, get_gradient_edge(y)  # needs no memory for y
                links.outputs.send(y.detach())
            del x, y
        else:
            grad = None if _is_last(mesh, chunk) else links.output_grads.receive()
            before_backward(micro_batch, chunk)
            x, output = alive.pop((micro_batch, chunk))
            torch.autograd.backward(output, grad)
            if x is not None:
                assert x.grad is not None, "a stage must use its input"
                links.input_grads.send(x.grad)
            del x, output, grad
    links.outputs.wait()
    links.input_grads.wait()


def forward_only(
    mesh: Mesh,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    forward: Callable[[int, Tensor | None], Output | Tensor],
) -> Output | Tensor:
    """Run one micro-batch through all stages; returns the output of this stage's last chunk.

    `forward(chunk, x)` returns the activations `shape` for the next piece of the model.
    """
    actions = [Action(True, 0, chunk) for chunk in range(mesh.num_chunks)]
    links = _Links(mesh, actions, [shape], dtype)
    for _, _, chunk in actions:
        y = forward(chunk, None if _is_first(mesh, chunk) else links.inputs.receive())
        if not _is_last(mesh, chunk):
            assert isinstance(y, Tensor)
            links.outputs.send(y)
    links.outputs.wait()
    return y


def _is_first(mesh: Mesh, chunk: int) -> bool:
    return mesh.pp.rank == 0 and chunk == 0


def _is_last(mesh: Mesh, chunk: int) -> bool:
    return mesh.is_last_stage and chunk == mesh.num_chunks - 1


def _started(work: dist.Work | None) -> list[dist.Work]:
    assert work is not None, "this rank is not in the group"
    return [work]


class _Inbox:
    """Receives tensors from another stage; on CPUs the next one while the current one is in use."""

    def __init__(
        self, group: dist.ProcessGroup, source: int, buffers: Iterator[Tensor], *, is_early: bool
    ) -> None:
        self._group, self._source, self._buffers = group, source, buffers
        self._is_early = is_early
        self._next = self._post_receive() if is_early else None

    def _post_receive(self) -> Pending | None:
        buffer = next(self._buffers, None)
        if buffer is None:
            return None
        return Pending(
            buffer, _started(dist.irecv(buffer, group=self._group, group_src=self._source))
        )

    def receive(self) -> Tensor:
        message = self._next or self._post_receive()
        assert message is not None, "there are no more messages"
        tensor = message.wait()
        self._next = self._post_receive() if self._is_early else None
        return tensor


class _Outbox:
    """Sends tensors to another stage."""

    def __init__(self, group: dist.ProcessGroup, target: int) -> None:
        self._group, self._target = group, target
        self._pending: deque[Pending] = deque()

    def send(self, tensor: Tensor) -> None:
        self.wait(MAX_PENDING - 1)
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=self._group, group_dst=self._target)
        self._pending.append(Pending(tensor, _started(work)))

    def wait(self, max_pending: int = 0) -> None:
        """Wait until at most `max_pending` sends are outstanding."""
        while len(self._pending) > max_pending:
            self._pending.popleft().wait()


class _Links:
    """The connections of a stage to the stages before and after it; see [Note: messages]."""

    def __init__(
        self,
        mesh: Mesh,
        actions: Sequence[Action],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        p, rank = mesh.pp.size, mesh.pp.rank
        before, after = (rank - 1) % p, (rank + 1) % p
        # Without chunks, no messages pass from the last stage to the first, which have no group.
        most = len(mesh.pipeline_groups) - 1
        group_before = mesh.pipeline_groups[min(link_kind(before, p), most)]
        group_after = mesh.pipeline_groups[min(link_kind(rank, p), most)]

        def buffers(of_forward: bool) -> Iterator[Tensor]:
            for is_forward, micro_batch, chunk in actions:
                is_end = _is_first(mesh, chunk) if of_forward else _is_last(mesh, chunk)
                if is_forward == of_forward and not is_end:
                    yield torch.empty(shapes[micro_batch], dtype=dtype, device=mesh.device)

        early = mesh.device.type == "cpu"  # see [Note: messages]
        self.inputs = _Inbox(group_before[0], before, buffers(True), is_early=early)
        self.outputs = _Outbox(group_after[0], after)
        self.output_grads = _Inbox(group_after[1], after, buffers(False), is_early=early)
        self.input_grads = _Outbox(group_before[1], before)
