"""Host time of one layer and micro-batch, which a GPU waits for if its kernels are short.

    python -m bench.host_time

A model so small that arithmetic is nothing, one process, one thread, CPU time of the thread, fp32.
Beside ours: the same block in plain PyTorch, alone and under FSDP2 on one rank.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from configs import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from model import build_model
from ops.dropout import dropout_keys
from parallel import DropoutStream, Mesh
from parallel.mesh import make_mesh

_HIDDEN, _HEADS, _SEQ, _VOCAB = 16, 2, 8, 64
_FEW, _MANY = 4, 20  # layers; the difference is free of what is outside layers
_WARM_UP, _REPEATS = 4, 16


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


def plain(num_layers: int, *, fsdp: bool) -> Callable[[], tuple[float, float]]:
    """Make a forward and backward of plain blocks that returns the thread time of each."""
    model = nn.Sequential(*(PlainBlock() for _ in range(num_layers)))
    if fsdp:
        mesh = init_device_mesh("cpu", (1,))
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    x = torch.randn(1, _SEQ, _HIDDEN)
    return lambda: _timed(model, lambda: model(x.requires_grad_()).sum())


def ours(num_layers: int, mesh: Mesh, dropout: float) -> Callable[[], tuple[float, float]]:
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


def per_layer(make: Callable[[int], Callable[[], tuple[float, float]]]) -> tuple[float, float]:
    """Milliseconds of forward and of backward that one more layer costs."""
    few, many = make(_FEW), make(_MANY)
    samples = [(few(), many()) for _ in range(_WARM_UP + _REPEATS)][_WARM_UP:]
    return tuple(  # type: ignore[return-value]
        1e3
        / (_MANY - _FEW)
        * (
            statistics.median(many[part] for _, many in samples)
            - statistics.median(few[part] for few, _ in samples)
        )
        for part in (0, 1)
    )


def main() -> None:
    """Print a line for each variant."""
    torch.set_num_threads(1)
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = make_mesh(1, sequence_parallel=False, device=torch.device("cpu"), local_rank=0)
    compiled = replace(mesh, compile=True)
    variants: dict[str, Callable[[int], Callable[[], tuple[float, float]]]] = {
        "plain block": lambda layers: plain(layers, fsdp=False),
        "plain block, FSDP2": lambda layers: plain(layers, fsdp=True),
        "ours": lambda layers: ours(layers, mesh, 0.0),
        "ours, dropout 0.1": lambda layers: ours(layers, mesh, 0.1),
        "ours, compiled": lambda layers: ours(layers, compiled, 0.0),
        "ours, compiled, dropout 0.1": lambda layers: ours(layers, compiled, 0.1),
    }
    sys.stdout.write("ms per layer and micro-batch     forward  backward  together\n")
    for name, make in variants.items():
        forward, backward = per_layer(make)
        sys.stdout.write(f"{name:<32} {forward:7.3f} {backward:9.3f} {forward + backward:9.3f}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
