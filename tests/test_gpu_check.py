"""The script of `make gpu-check`, on a CPU with tiny sizes."""

import os
import re
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from bench import gpu_check
from ops.dropout import dropout_keys
from parallel import Mesh
from tests.distributed import DEVICE, ONE_RANK, OnDevice, distributed
from tests.lines import ROOT

pytestmark = pytest.mark.timeout(600)


def with_required(name: str) -> set[str]:
    """A package and all that it requires."""
    required = map(Requirement, distribution(name).requires or ())
    names = [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {name}.union(*map(with_required, names))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment that has torch and what the check installs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in with_required("torch") | {*gpu_check._MODULES.values()}:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            (site / top).unlink(missing_ok=True)
            (site / top).symlink_to(str(installed.locate_file(top)))
    return str(folder / "bin" / "python")


def check(tmp_path: Path, *arguments: str, python: str = sys.executable) -> tuple[int, str]:
    command = [python, str(ROOT / "bench" / "gpu_check.py"), str(tmp_path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    page = (tmp_path / "gpu_check.md").read_text()
    assert page == result.stdout
    return result.returncode, page


@pytest.mark.slow
def test_a_bare_machine_needs_no_other_packages(tmp_path: Path, bare_python: str) -> None:
    """Beside torch, those that the check installs are enough."""
    only = ("--only", "memory")
    code, page = check(tmp_path, "--device", "cpu", "--tiny", *only, python=bare_python)
    assert code == 0, page


def test_a_bare_machine_finds_the_tests(bare_python: str) -> None:
    """None of their files imports another package."""
    command = [bare_python, "-m", "pytest", "--collect-only", "-q", *gpu_check._TESTS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "test_huggingface" not in result.stdout


@pytest.mark.slow
def test_every_section_has_results(tmp_path: Path, bare_python: str) -> None:
    """Losses of both precisions, a row per variant, kernels, peaks, and the number of tests."""
    code, page = check(tmp_path, "--device", "cpu", "--tiny", python=bare_python)
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
    assert page.count("FAILED: exit code") == 2
    assert "CPU, fp32: " in page  # what was found before
    monkeypatch.setitem(gpu_check.SECTIONS, "losses", ("Losses", 0.1, gpu_check.check_losses))
    assert "FAILED: not done after 1.0 s" in gpu_check.run_section(
        "losses", gpu_check.Options("cpu", tiny=True), str(tmp_path)
    )


def test_tests_that_take_too_long_have_not_failed() -> None:
    """The page says how many have passed; it is a failure if one has failed, or if none has run."""
    some = ["so far: 1 passed, 0 failed\n", "- 50 lines\n", "so far: 2 passed, 0 failed\n"]
    assert gpu_check.split_progress(some) == ("- 50 lines\n", "stopped after 2 passed, 0 failed")
    failed = ["- test_a FAILED\n", "so far: 2 passed, 10 failed\n"]
    problem = "FAILED: stopped after 2 passed, 10 failed"
    assert gpu_check.split_progress(failed) == (failed[0], problem)
    assert gpu_check.split_progress([]) == ("", "")


def test_the_end_of_a_section_ends_its_programs() -> None:
    """Those in a session of their own too, but no others."""
    command = ["sleep", "60"]
    programs = [
        subprocess.Popen(command, env={"MICROTRON_GPU_CHECK": m}, start_new_session=True)
        for m in ("this one", "another")
    ]
    gpu_check.kill_marked("this one")
    assert programs[0].wait(10) == -9
    assert programs[1].poll() is None
    programs[1].kill()
    programs[1].wait()


@distributed(ONE_RANK)
def test_tests_for_cpus_see_no_gpu(mesh: Mesh) -> None:
    """Also on a machine that has some; a check that one is there must not start CUDA in a fork."""
    if DEVICE == "cpu":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    else:
        assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


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
