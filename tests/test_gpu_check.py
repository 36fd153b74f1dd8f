"""The script of `make gpu-check`, on a CPU with tiny sizes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from ops.dropout import dropout_keys
from tests.distributed import OnDevice
from tests.lines import ROOT

pytestmark = pytest.mark.timeout(600)


def check(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), str(tmp_path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    page = (tmp_path / "gpu_check.md").read_text()
    assert page == result.stdout
    return result.returncode, page


@pytest.mark.slow
def test_every_section_has_results(tmp_path: Path) -> None:
    """Losses of both precisions, a row per variant, kernels, peaks, and the number of tests."""
    code, page = check(tmp_path, "--device", "cpu", "--tiny")
    assert code == 0, page
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        line
        for title, _, _ in gpu_check.SECTIONS.values()
        for line in re.findall(rf"^## {title} \(\d+ s of \d+\)$", page, re.MULTILINE)
    ]
    assert "| fp32 | " in page
    assert len(re.findall(r"^\| gpt_(?:125m|1b) .*%", page, re.MULTILINE)) == 12
    assert "flash_attention_for_cpu" in page
    assert re.search(r"^[1-9]\d* passed$", page, re.MULTILINE)


@pytest.mark.slow
def test_a_section_that_fails_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each says why: a device that is not there, a time limit."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, page = check(tmp_path, "--tiny", "--only", "profile", "losses")
    assert code == 1
    assert page.count("FAILED with exit code") == 2
    assert "CPU, fp32: " in page  # what was found before
    monkeypatch.setitem(gpu_check.SECTIONS, "losses", ("Losses", 0.1, gpu_check.check_losses))
    assert "FAILED: not done after 1.0 s" in gpu_check.run_section(
        "losses", gpu_check.Options("cpu", tiny=True), str(tmp_path)
    )


def test_tests_create_their_tensors_on_the_test_device() -> None:
    """Draws from a generator stay those of the CPU; what our own code creates stays where it is."""
    with OnDevice(torch.device("meta")):
        made = [
            torch.zeros(2),
            torch.tensor([1.0]),
            torch.randn(2, generator=torch.Generator().manual_seed(1)),
        ]
        on_cpu = [torch.ones(2, device="cpu"), dropout_keys(0, 0, (1,), 1)]
    assert [tensor.device.type for tensor in made] == ["meta"] * 3
    assert [tensor.device.type for tensor in on_cpu] == ["cpu"] * 2
