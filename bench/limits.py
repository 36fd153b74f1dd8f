"""Upper limit of the machine: matrix products of the workload's shapes, and nothing else.

docs/benchmarks.md reports MFU relative to this rate. Each product of a step, forward and both of
backward, is timed alone, best of a few, and weighted by how often a step runs it. Two ranks run
their halves at the same time, and their rates are added.
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from bench.timing import leave, report
from bench.workload import Workload, join, parse

_REPEATS = 3


def shapes(shape: Workload) -> list[tuple[int, int, int, int]]:
    """(times in a step, m, k, n) of the forward products of one rank: [m, k] times [k, n]."""
    h, f, t = shape.hidden_size, shape.ffn_hidden_size, shape.tp
    rows = shape.tokens_per_step // shape.dp
    return [
        (shape.num_layers, rows, h, 3 * h // t),
        (shape.num_layers, rows, h // t, h),
        (shape.num_layers, rows, h, f // t),
        (shape.num_layers, rows, f // t, h),
        (1, rows, h, shape.vocab_size // t),
    ]


def flops_per_second(shape: Workload, dtype: torch.dtype) -> float:
    """Measure the operations per second of this rank over all products of a step."""
    operations = seconds = 0.0
    for times, m, k, n in shapes(shape):
        x, weight, grad = (
            torch.randn(size).to(dtype).requires_grad_(False) for size in ((m, k), (n, k), (m, n))
        )
        seconds += times * _best_s(lambda x=x, w=weight: x @ w.t())  # type: ignore[misc]
        seconds += times * _best_s(lambda g=grad, w=weight: g @ w)  # type: ignore[misc]
        seconds += times * _best_s(lambda g=grad, x=x: g.t() @ x)  # type: ignore[misc]
        operations += times * 3 * 2.0 * m * k * n
    return operations / seconds


def _best_s(product: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + _REPEATS):
        if dist.is_initialized():
            dist.barrier()
        started_at = time.perf_counter()
        product()
        times.append(time.perf_counter() - started_at)
    return min(times[1:])


def main() -> int:
    """Measures both precisions."""
    shape = parse().workload
    join(shape)
    rates = {}
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rate = torch.tensor(flops_per_second(shape, dtype), dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(rate)
        rates[precision] = rate.item()
    report({"flops_per_second": rates})
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
