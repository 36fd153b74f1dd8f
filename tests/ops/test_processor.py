"""Processors parsed from /proc/cpuinfo, and their fast precision."""

import platform
import time
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import ops.processor
from ops.matmul import Choice, Precision, attention_dtype, matmul_dtype
from ops.processor import (
    choice_before_manifests,
    known_choice,
    measure_precision,
    parse_processor,
)

BF16 = torch.zeros(1, dtype=torch.bfloat16)
X86 = (
    "processor\t: {}\nvendor_id\t: {}\nmodel name\t: {}\nflags\t\t: fpu sse2 {}\nbogomips\t: 2\n\n"
)
SAPPHIRE_RAPIDS = X86.format(
    0, "GenuineIntel", "Intel(R) Xeon(R) 8480+", "avx512_bf16 amx_bf16 amx_tile"
)
COOPER_LAKE = X86.format(0, "GenuineIntel", "Intel(R) Xeon(R) Processor", "avx512f avx512_bf16")
ZEN_4 = X86.format(0, "AuthenticAMD", "AMD EPYC 9654 96-Core Processor", "avx512f avx512_bf16")
ZEN_3 = X86.format(0, "AuthenticAMD", "AMD EPYC", "avx2") + X86.format(1, "other", "other", "")
OTHER_VENDOR = X86.format(0, "HygonGenuine", "Hygon C86", "avx512_bf16")
ARM = """processor\t: 0
BogoMIPS\t: 2000.00
Features\t: fp asimd sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd4f

"""


@pytest.mark.parametrize(
    ("cpuinfo", "name", "known", "before"),
    [
        (SAPPHIRE_RAPIDS, "Intel(R) Xeon(R) 8480+", "native", "native"),
        (COOPER_LAKE, "Intel(R) Xeon(R) Processor", "widened", "widened"),
        (ZEN_4, "AMD EPYC 9654 96-Core Processor", "native", "widened"),
        (ZEN_3, "AMD EPYC", None, "widened"),
        (OTHER_VENDOR, "Hygon C86", None, "widened"),
        (ARM, "aarch64 0x41 0xd4f", None, "native"),
        ("processor\t: 0\n", "aarch64", None, "native"),
        ("", "aarch64", None, "native"),  # macOS
    ],
)
def test_known_processors(
    monkeypatch: pytest.MonkeyPatch,
    cpuinfo: str,
    name: str,
    known: Choice | None,
    before: Choice,
) -> None:
    """Vendor and flags decide; `before`: the precision of checkpoints that record none."""
    machine = "x86_64" if "flags" in cpuinfo else "aarch64"
    monkeypatch.setattr(platform, "machine", lambda: machine)
    cpu = parse_processor(cpuinfo)
    assert (cpu.name, known_choice(cpu), choice_before_manifests(cpu)) == (name, known, before)


@pytest.mark.parametrize("matmul", ["native", "widened"])
@pytest.mark.parametrize("attention", ["native", "widened"])
def test_the_faster_precision_is_measured(
    monkeypatch: pytest.MonkeyPatch, matmul: Choice, attention: Choice
) -> None:
    """Matmuls and attention each get their own; first calls, which are slow, do not decide."""
    clock = SimpleNamespace(now_s=0.0, calls=0)

    def takes(faster: Choice, dtype: torch.dtype) -> None:
        in_use = "native" if dtype == torch.bfloat16 else "widened"
        clock.calls += 1
        clock.now_s += (1.0 if in_use == faster else 1.1) + (clock.calls < 3)

    def timed_linear(x: Tensor, weight: Tensor) -> Tensor:
        takes(matmul, matmul_dtype(x))
        return x.sum() * weight.sum()

    def timed_sdpa(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        takes(attention, attention_dtype(q))
        return q + k + v

    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    monkeypatch.setattr(ops.processor, "linear", timed_linear)
    monkeypatch.setattr(ops.processor, "sdpa", timed_sdpa)
    before = matmul_dtype(BF16), attention_dtype(BF16)
    assert measure_precision() == Precision(matmul, attention)
    assert (matmul_dtype(BF16), attention_dtype(BF16)) == before


def test_this_processor_is_measured() -> None:
    """The real kernels run in both precisions, and one of them is chosen for each."""
    measured = measure_precision()
    assert {measured.matmul, measured.attention} <= {"native", "widened"}
