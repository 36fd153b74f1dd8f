"""Pages in docs/ quote what programs print, and name files and tests that exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.trace_layer import CONFIG, B, S, trace
from parallel import Mesh
from tests.distributed import TENSOR_PARALLEL, Layout, distributed
from tests.lines import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
LONGEST_LINE = 120
LONGEST_README = 150
README = (ROOT / "README.md").read_text("utf-8")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the virtual environment from the root, on CPUs."""
    return subprocess.run(
        [Path(sys.executable).with_name(str(command[0])), *command[1:]],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_page_quotes_the_trace() -> None:
    """Word for word. If the program is right, paste its output into the page."""
    ended = run("torchrun", "--nproc-per-node", "2", "-m", "docs.trace_layer")
    assert ended.returncode == 0, ended.stderr
    assert f"```\n{ended.stdout}```\n" in PAGE.read_text("utf-8")


@pytest.mark.slow
def test_a_wrong_number_of_ranks_is_an_error() -> None:
    """Four heads cannot be shared by three ranks."""
    ended = run("python", "-m", "docs.trace_layer", RANK="0", WORLD_SIZE="3", LOCAL_RANK="0")
    assert ended.returncode == 2
    assert ended.stderr == "3 ranks cannot share 4 attention heads; start 1, 2 or 4\n"


@distributed(*TENSOR_PARALLEL)
def test_the_trace_follows_the_layout(mesh: Mesh) -> None:
    """There are s/t positions outside the matrices and h/t channels inside."""
    t, h = mesh.tp.size, CONFIG.hidden_size
    lines = [line.split() for line in trace(mesh)]
    outside = S // t if mesh.sequence_parallel else S
    # Once in forward, once as a gradient in backward.
    assert lines.count(["proj", "+", "bias", f"[{outside},", f"{B},", f"{h}]"]) == 2
    assert lines.count(["q", f"[{S},", f"{B},", f"{h // t}]"]) == 2
    full = S * B * h * 4
    if mesh.sequence_parallel:
        sent = (t - 1) * full // t
        assert lines.count(["all-gather", str(full), str(sent)]) == 4
        assert lines.count(["reduce-scatter", str(full), str(sent)]) == 4
        assert ["all-reduce", str(6 * h * 4), str(2 * (t - 1) * 6 * h * 4 // t)] in lines
    else:
        assert lines.count(["all-reduce", str(full), str(2 * (t - 1) * full // t)]) == 4
    assert lines.count(["total", str(4 * (t - 1) * full // t)]) == 2


@distributed(Layout(cp=2), Layout(cp=4))
def test_the_trace_of_context_parallelism(mesh: Mesh) -> None:
    """Only attention sees other positions: a gather of K and V, again in backward, and a sum."""
    c, h = mesh.cp.size, CONFIG.hidden_size
    lines = [line.split() for line in trace(mesh)]
    for step in (["q"], ["attention"], ["proj", "+", "bias"], ["input", "of", "q", "and", "kv"]):
        assert lines.count([*step, f"[{S // c},", f"{B},", f"{h}]"]) == 2
    full = 2 * S * B * h * 4  # K and V
    sent = str((c - 1) * full // c)
    assert lines.count(["all-gather", str(full), sent]) == 2
    assert lines.count(["reduce-scatter", str(full), sent]) == 1
    assert not any("all-reduce" in line for line in lines)


@distributed(*TENSOR_PARALLEL)
def test_saved_bytes_equal_the_formula(mesh: Mesh) -> None:
    """The page's formula, sbh (4 + 28/t) or (8 + 24/t), in float32 with the small terms it omits.

    Split by sequence parallelism: the inputs of two norms, with mean and deviation per token. Not
    split: two gathered inputs. Split by tensor parallelism: q, k, v, the output and log-sum-exp of
    attention, and both sides of gelu.
    """
    t, h, a, f = mesh.tp.size, CONFIG.hidden_size, CONFIG.num_attention_heads, CONFIG.ffn_size
    outside = S // t if mesh.sequence_parallel else S
    norms = 2 * outside * B * (h + 2)
    matrices = S * B * (4 * h + a + 2 * f) // t
    saved_bytes = 4 * (norms + 2 * S * B * h + matrices)
    assert f"  saved for backward: {saved_bytes} B" in list(trace(mesh))


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_and_tests_of_a_page_exist(page: Path) -> None:
    """Linked files and named tests exist, and lines fit a terminal."""
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).is_file(), link
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / file).read_text("utf-8"), name
    long = [line for line in text.splitlines() if len(line) > LONGEST_LINE]
    assert [line for line in long if not line.startswith("|")] == []  # a row of a table may be


def test_the_page_of_settings_is_generated() -> None:
    """`python -m configs > docs/settings.md` writes it."""
    assert run("python", "-m", "configs").stdout == (ROOT / "docs/settings.md").read_text("utf-8")


def test_the_readme_quotes_an_error() -> None:
    """The error of a mistyped key, word for word."""
    quoted = re.search(r"^\$ python (train.py .*)\n(config error: .*)$", README, re.MULTILINE)
    assert quoted is not None
    ended = run("python", *quoted[1].split())
    assert (ended.returncode, ended.stderr) == (2, f"{quoted[2]}\n")


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_names_in_a_root_page_exist(page: str) -> None:
    """Links, modules and tests exist; ARCHITECTURE.md names tests relative to tests/."""
    text = (ROOT / page).read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (ROOT / link).is_file(), link
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "tests")), name
    assert page != "README.md" or len(text.splitlines()) < LONGEST_README
