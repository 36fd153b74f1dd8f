"""Processors parsed from /proc/cpuinfo, and their fast precision."""

import platform

import pytest

from ops.matmul import Choice
from ops.processor import (
    choice_before_manifests,
    known_choice,
    measure_precision,
    parse_processor,
    processor,
)

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


def test_this_processor_is_measured() -> None:
    """The measurement finds a precision that is clearly faster."""
    flags, measured = processor().flags, measure_precision()
    if "avx2" in flags and not flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert"}:
        assert (measured.matmul, measured.attention) == ("widened", "widened")
