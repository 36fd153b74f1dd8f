"""Trace one block: what every rank holds and sends in one forward and one backward pass.

    torchrun --nproc-per-node 2 -m docs.trace_layer

Prints the tables of docs/tutorial.md: tensor parallelism with sequence parallelism and without, and
context parallelism. Hooks read shapes, collectives are recorded as they are issued, and saved
tensors are counted as autograd saves them. Only the names of the lines are written by hand.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from configs.launch import exit_with_error, world_size_from_environment
from configs.schema import ModelConfig
from model.context import make_attention_context
from model.gpt import Block
from ops.balance import balanced_positions
from ops.dropout import dropout_keys
from ops.segments import make_key_blocks
from parallel import (
    DropoutStream,
    Mesh,
    close_mesh,
    gather_json,
    init_mesh,
    initialise_parameters,
    local_gradients,
    local_shards,
    sequence_shard,
    sum_partial_gradients,
)
from parallel.mesh import make_mesh
from parallel.transport.traffic import Collective, record_traffic

# No two of s, b, h, f and their quotients by 2 or 4 are equal, but 2h/t = h where t is 2.
S, B = 8, 3
CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=20,
    num_attention_heads=4,
    ffn_hidden_size=64,
    seq_length=S,
    hidden_dropout=0.1,
)
SEED = 1

# The tensors that get a line: inputs and outputs of modules, and inputs of matmuls.
STEPS = {
    ("attention_norm", "in"): "x, the block's input",
    ("attention_norm", "out"): "norm",
    ("attention.qkv", "operand"): "input of q and kv",
    ("attention.qkv", "out"): "q and kv",
    ("attention.proj", "in"): "attention",
    ("attention.proj", "out"): "proj + bias",
    ("mlp_norm", "in"): "dropout + residual",
    ("mlp_norm", "out"): "norm",
    ("mlp.expand", "operand"): "input of up",
    ("mlp.expand", "out"): "up",
    ("mlp.down", "in"): "gelu",
    ("mlp.down", "out"): "down + bias",
    ("", "out"): "dropout + residual, the output",
}


@dataclass(frozen=True)
class Line:
    """A tensor that this rank holds, and the collectives issued since the line before."""

    step: str
    shape: tuple[int, ...]
    traffic: tuple[Collective, ...]


class Tracer(TorchFunctionMode):
    """Writes a line whenever a tensor of STEPS, or its gradient, is there."""

    def __init__(self, block: Block, traffic: list[Collective]) -> None:
        super().__init__()
        self.traffic, self.num_seen = traffic, 0
        self.name_of = {id(weight): name for name, weight in block.named_parameters()}
        self.forward: list[Line] = []
        self.backward: list[Line] = []
        for name, module in block.named_modules():
            if (name, "in") in STEPS:
                module.register_forward_pre_hook(partial(self.see_input, STEPS[name, "in"]))
            if (name, "out") in STEPS:
                module.register_forward_hook(partial(self.see_output, STEPS[name, "out"]))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            name = self.name_of[id(args[1])].removesuffix(".weight")
            if step := STEPS.get((name, "operand")):
                self.see(step, args[0])
        return func(*args, **(kwargs or {}))

    def see_input(self, step: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook of a module."""
        self.see(step, inputs[0])

    def see_output(self, steps: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """A forward hook of a module, which returns one tensor or several."""
        several = isinstance(output, tuple)
        for step, tensor in zip(steps.split(" and "), output if several else [output], strict=True):
            self.see(step, tensor)

    def see(self, step: str, tensor: Tensor) -> None:
        """Write the line of a tensor now, and that of its gradient once autograd has it."""
        self.forward.append(self.line(step, tensor))
        tensor.register_hook(lambda grad: self.backward.append(self.line(step, grad)))

    def line(self, step: str, tensor: Tensor) -> Line:
        """The line of a tensor, with the collectives since the line before."""
        new = tuple(self.traffic[self.num_seen :])
        self.num_seen = len(self.traffic)
        return Line(step, tuple(tensor.shape), new)


def make_block(mesh: Mesh) -> Block:
    """A block with its weights."""
    block = Block(CONFIG, 0, mesh, recompute="none")
    block.to_empty(device=mesh.device)
    initialise_parameters(block, SEED, mesh)
    return block


def trace(mesh: Mesh) -> Iterator[str]:
    """The lines of one layout. Collective: every rank must go through all of it."""
    block = make_block(mesh)
    cp = mesh.cp
    own = balanced_positions(S, cp.rank, cp.size, mesh.device)  # [s/c], all of them without cp
    stream = DropoutStream(SEED, 0, 0, dropout_keys(SEED, 0, range(B), 1).to(mesh.device))
    blocks = make_key_blocks(S, None, cp.rank, cp.size)
    positions = own.unsqueeze(1).expand(-1, B)
    context = make_attention_context(CONFIG, positions, blocks, stream, torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    whole = torch.randn(S, B, CONFIG.hidden_size, generator=generator).to(mesh.device)
    x = sequence_shard(whole[own], mesh).clone().requires_grad_()
    with record_traffic() as traffic:
        tracer = Tracer(block, traffic)
        with tracer, count_saved(block) as saved_bytes:
            y = block(x, context)
        y.backward(torch.ones_like(y))
    assert tracer.num_seen == len(traffic), "every collective belongs before some line"
    with record_traffic() as summing:
        sum_partial_gradients(local_gradients(block), mesh)

    on = "with" if mesh.sequence_parallel else "without"
    kind = "context parallelism" if cp.size > 1 else f"{on} sequence parallelism"
    yield f"{mesh.world.size} rank{'s' * (mesh.world.size > 1)}, {kind}"
    yield ""
    yield row("forward", "on each rank", "on the wire", "full B", "sent B")
    yield from table(tracer.forward, mesh)
    yield row(f"  saved for backward: {sum(saved_bytes.values())} B")
    yield ""
    yield row("backward: the gradient of")
    yield from table(tracer.backward, mesh)
    yield ""
    yield row("after backward: the sum of partial gradients")
    yield from wire(summing)
    if not summing:
        yield row("  none is partial")
    yield ""


def row(step: str, shape: str = "", kind: str = "", full: object = "", sent: object = "") -> str:
    """Cells in columns: step, shape, kind, bytes in full, bytes sent."""
    return f"{step:<34} {shape:<14} {kind:<15} {full!s:>7} {sent!s:>7}".rstrip()


def table(lines: list[Line], mesh: Mesh) -> Iterator[str]:
    """A line for each tensor, with its shape on all ranks (once if it is the same), and a sum."""
    of_ranks = gather_json(mesh, [line.shape for line in lines])
    for number, line in enumerate(lines):
        yield from wire(line.traffic)
        shapes = dict.fromkeys(str(shapes[number]) for shapes in of_ranks)
        yield row("  " + line.step, " / ".join(shapes))
    sent = sum(collective.sent_bytes for line in lines for collective in line.traffic)
    yield row("  total", "", "", "", f"{sent:.0f}")


def wire(traffic: Sequence[Collective]) -> Iterator[str]:
    """A line for each collective: kind, bytes of the full tensor, bytes that a rank sends."""
    for collective in traffic:
        kind = collective.kind.replace("_", "-")
        yield row("", "", kind, collective.full_bytes, f"{collective.sent_bytes:.0f}")


def weights(mesh: Mesh) -> Iterator[str]:
    """A line for each weight: shape, shape on a rank, and whether a rank's gradient is whole."""
    block = make_block(mesh)
    yield f"{'weights':<34} {'in full':<14} {'on each rank':<15} gradient"
    for name, shard in local_shards(block).items():
        full, local = list(shard.global_shape), list(shard.tensor.shape)
        gradient = "partial" if shard.grad_is_partial else "whole"
        yield f"  {name:<32} {full!s:<14} {local!s:<15} {gradient}"


@contextmanager
def count_saved(block: Block) -> Iterator[dict[int, int]]:
    """Bytes of each piece of memory that autograd keeps inside, by its address; no weights."""
    of_weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    saved_bytes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_weights:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved_bytes


def main() -> int:
    """Print the tables of all layouts; rank 0 alone writes."""
    num_ranks = world_size_from_environment()
    if CONFIG.num_attention_heads % num_ranks:
        exit_with_error(f"{num_ranks} ranks cannot share 4 attention heads; start 1, 2 or 4")
    mesh = init_mesh(num_ranks, sequence_parallel=True)
    lines: list[str] = []
    for sequence_parallel in dict.fromkeys((mesh.sequence_parallel, False)):
        layout = dataclasses.replace(mesh, sequence_parallel=sequence_parallel)
        lines += trace(layout)
    if num_ranks > 1:
        lines += trace(
            make_mesh(1, False, mesh.device, mesh.local_rank, context_parallel_size=num_ranks)
        )
    lines += weights(mesh)
    if mesh.world.rank == 0:
        sys.stdout.write("\n".join([*lines, ""]))
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
