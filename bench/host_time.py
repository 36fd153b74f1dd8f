"""Host time of one layer and micro-batch, which a GPU waits for if its kernels are short.

    python -m bench.host_time

A model so small that arithmetic is nothing, one process, one thread, CPU time of the thread, fp32.
Beside ours: the same block in plain PyTorch, alone and under FSDP2 on one rank. Then whole steps in
wall time, without clipping: train.py's `train_step`, with embedding, head, loss and the next batch,
and AdamW on as many plain blocks under FSDP2.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from bench.ours import build_run, settings, stepper
from bench.workload import Workload
from configs import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig, parse_config
from model import build_model
from ops.dropout import dropout_keys
from parallel import DropoutStream, Mesh
from parallel.mesh import make_mesh
from training.run_folder import RunFolder
from training.state import RunState, training_batches

_HIDDEN, _HEADS, _SEQ, _VOCAB = 16, 2, 8, 64
_FEW, _MANY = 4, 20  # layers; the difference is free of what is outside layers
_WARM_UP, _REPEATS = 4, 32
_PLAIN, _FSDP = "plain block", "plain block, FSDP2"

Timed = Callable[[], tuple[float, float]]  # of forward and of backward


class PlainBlock(nn.Module):
    """The same arithmetic as our block."""

    def __init__(self) -> None:
        super().__init__()
        h = _HIDDEN
        self.norm1, self.norm2 = nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to `[b, s, h]`."""
        b, s, h = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, s, h))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def plain_model(num_layers: int, *, fsdp: bool) -> nn.Module:
    """Make a stack of plain blocks."""
    model = nn.Sequential(*(PlainBlock() for _ in range(num_layers)))
    if fsdp:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def plain(num_layers: int, *, fsdp: bool) -> Timed:
    """Make a forward and backward of plain blocks that returns the thread time of each."""
    model = plain_model(num_layers, fsdp=fsdp)
    x = torch.randn(1, _SEQ, _HIDDEN)
    return lambda: _timed(model, lambda: model(x.requires_grad_()).sum())


def ours(num_layers: int, mesh: Mesh, dropout: float) -> Timed:
    """Make a forward and backward of our model that returns the thread time of each."""
    config = Config(
        model=ModelConfig(
            num_layers=num_layers,
            hidden_size=_HIDDEN,
            num_attention_heads=_HEADS,
            seq_length=_SEQ,
            hidden_dropout=dropout,
        ),
        data=DataConfig(vocab_size=_VOCAB),
        train=TrainConfig(precision="fp32"),
        parallel=ParallelConfig(recompute_granularity="none"),
    )
    model = build_model(config, mesh)
    tokens = torch.randint(_VOCAB, (1, _SEQ))
    positions = torch.arange(_SEQ).unsqueeze(0)
    stream = DropoutStream(1, 2, 3, dropout_keys(1, 2, [3], num_layers)) if dropout else None
    return lambda: _timed(model, lambda: model(tokens, positions, tokens, stream).objective)


def _timed(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[float, float]:
    started = time.thread_time()
    loss = forward()
    between = time.thread_time()
    loss.backward()
    ended = time.thread_time()
    for parameter in model.parameters():
        parameter.grad = None
    return between - started, ended - between


def per_layer(variants: Mapping[str, Callable[[int], Timed]]) -> dict[str, tuple[float, float]]:
    """Milliseconds of forward and of backward that one more layer costs, in interleaved rounds."""
    models = {name: (make(_FEW), make(_MANY)) for name, make in variants.items()}
    rounds = [
        {name: (few(), many()) for name, (few, many) in models.items()}
        for _ in range(_WARM_UP + _REPEATS)
    ][_WARM_UP:]

    def median_ms(name: str, part: int) -> float:
        """Median over the rounds; `part`: 0 for forward, 1 for backward."""
        times = ((each[name][1][part] - each[name][0][part]) for each in rounds)
        return 1e3 / (_MANY - _FEW) * statistics.median(times)

    return {name: (median_ms(name, 0), median_ms(name, 1)) for name in models}


def plain_step() -> Callable[[int], float]:
    """Make a training step of plain blocks."""
    model = plain_model(_MANY, fsdp=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(1, _SEQ, _HIDDEN)

    def step(_: int) -> float:
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def print_steps(mesh: Mesh, folder: str) -> None:
    """Print the medians of interleaved steps, and the medians of their ratios."""
    shape = Workload(
        precision="fp32",
        num_layers=_MANY,
        hidden_size=_HIDDEN,
        num_attention_heads=_HEADS,
        seq_length=_SEQ,
        vocab_size=512,
        global_batch_size=1,
    )
    overrides = ("optimizer.clip_grad=0", f"run.directory={folder}", "logging.wandb=disabled")
    with ExitStack() as stack:
        steps = {"plain blocks, FSDP2, AdamW": plain_step()}
        for name, dropout in (("ours", 0.0), ("ours, dropout 0.1", 0.1)):
            workload = replace(shape, dropout=dropout)
            config = parse_config([*settings(workload), *overrides, f"run.name={dropout}"])
            run = build_run(config, mesh, RunFolder(config, mesh))
            batches = stack.enter_context(training_batches(run, RunState(wandb_id="none")))
            steps[name] = stepper(run, batches)
        rounds = []
        for number in range(_WARM_UP + 4 * _REPEATS):
            ends = [time.perf_counter()]
            for step in steps.values():
                step(number)
                ends.append(time.perf_counter())
            rounds.append([end - start for start, end in pairwise(ends)])
    sys.stdout.write(f"\nms per step, {_MANY} layers             ratio\n")
    for index, name in enumerate(steps):
        times = [each[index] for each in rounds[_WARM_UP:]]
        ratio = statistics.median(each[index] / each[0] for each in rounds[_WARM_UP:])
        sys.stdout.write(f"{name:<26} {1e3 * statistics.median(times):7.1f} {ratio:7.2f}\n")


def main() -> None:
    """Print a line for each variant."""
    torch.set_num_threads(1)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = make_mesh(1, sequence_parallel=False, device=torch.device("cpu"), local_rank=0)
    compiled = replace(mesh, compile=True)
    variants = {
        _PLAIN: lambda layers: plain(layers, fsdp=False),
        _FSDP: lambda layers: plain(layers, fsdp=True),
        "ours": lambda layers: ours(layers, mesh, 0.0),
        "ours, dropout 0.1": lambda layers: ours(layers, mesh, 0.1),
        "ours, compiled": lambda layers: ours(layers, compiled, 0.0),
        "ours, compiled, dropout 0.1": lambda layers: ours(layers, compiled, 0.1),
    }
    times_ms = per_layer(variants)
    sys.stdout.write(
        "ms per layer and micro-batch     forward  backward  together  of plain  of FSDP2\n"
    )
    for name, (forward, backward) in times_ms.items():
        both = forward + backward
        of_plain, of_fsdp = (both / sum(times_ms[other]) for other in (_PLAIN, _FSDP))
        times = f"{name:<32} {forward:7.3f} {backward:9.3f} {both:9.3f}"
        sys.stdout.write(f"{times} {of_plain:9.2f} {of_fsdp:9.2f}\n")
    with tempfile.TemporaryDirectory() as folder:
        print_steps(mesh, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
