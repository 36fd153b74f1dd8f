"""The processor of this host, and the precision in which it is fast: [Note: widening].

Measured: bf16 natively and widened, in GFLOP/s, and attention forward and backward of
`[4, 8, 1024, 64]` in ms.

    Zen 4, avx512_bf16          416 and 154   42.7 and 42.0   78 and 114
    Zen 3, one thread, 2026-11    8 and 66     120 and 101    3898 and 335
"""

import functools
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ops.matmul import Choice, Precision, linear, use_precision
from ops.sdpa import sdpa

_REPEATS = 4


@dataclass(frozen=True)
class Processor:
    """What decides the speed and the rounding of a CPU."""

    name: str
    vendor: str  # empty where it is unknown
    flags: frozenset[str]


@functools.cache
def processor() -> Processor:
    """The processor of this host."""
    return parse_processor(Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "")


def parse_processor(cpuinfo: str) -> Processor:
    """The first processor of a /proc/cpuinfo, whose fields depend on the architecture."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    arm = [fields[key] for key in ("CPU implementer", "CPU part") if key in fields]
    return Processor(
        fields.get("model name") or " ".join([platform.machine(), *arm]),
        fields.get("vendor_id", ""),
        frozenset(fields.get("flags", "").split()),
    )


def known_choice(cpu: Processor) -> Choice | None:
    """The faster precision if vendor and flags decide it; None: measure it."""
    has_avx512 = "avx512_bf16" in cpu.flags
    if "amx_bf16" in cpu.flags or (has_avx512 and cpu.vendor == "AuthenticAMD"):
        return "native"
    return "widened" if has_avx512 and cpu.vendor == "GenuineIntel" else None


def choice_before_manifests(cpu: Processor) -> Choice:
    """The precision of runs whose checkpoints do not record one."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return "widened" if is_x86 and "amx_tile" not in cpu.flags else "native"


def measure_precision() -> Precision:
    """Time matmuls, and attention, in both precisions in turn: a second or two on a slow core."""
    return Precision(
        _faster(linear, ((256, 256), (512, 256)), ((256, 512), (256, 512))),
        _faster(lambda q, k, v: sdpa(q, k, v, None, 0.0), [(256, 1, 4, 64)] * 3),
    )


def _faster(operation: Callable[..., Tensor], *calls: Sequence[tuple[int, ...]]) -> Choice:
    """The choice with the shortest forward and backward; a call is the shapes of its operands."""
    best_s: dict[Choice, float] = dict.fromkeys(get_args(Choice), float("inf"))
    for choice in [*best_s] * _REPEATS:
        previous = use_precision(Precision(choice, choice))
        started_at = time.perf_counter()
        for shapes in calls:
            operands = [torch.full(shape, 0.1, dtype=torch.bfloat16) for shape in shapes]
            y = operation(*(operand.requires_grad_() for operand in operands))
            y.backward(torch.ones_like(y))
        best_s[choice] = min(best_s[choice], time.perf_counter() - started_at)
        use_precision(previous)
    return min(best_s, key=best_s.__getitem__)
