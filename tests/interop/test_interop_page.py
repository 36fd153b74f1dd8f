"""docs/interop.md: every command of the page runs as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import Layout
from tests.lines import ROOT
from tests.random_runs import GPT2, write_run

PAGE = (ROOT / "docs" / "interop.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(language: str, text: str, folder: Path) -> str:
    """Run a block in a copy of the repository; returns what it prints."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "HOME": str(folder),  # contains the token cache
    }
    interpreter = {"sh": ["bash", "-ec"], "python": [sys.executable, "-c"]}[language]
    ended = subprocess.run(
        [*interpreter, text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_commands_in_order(tmp_path: Path) -> None:
    """Except make train, which is replaced by a small run of the same name."""
    for path in ROOT.glob("[!.]*"):
        if path.name not in ("runs", "exports"):
            (tmp_path / path.name).symlink_to(path)
    assert BLOCKS[0] == ("sh", "make train\n")
    write_run(tmp_path / "runs/gpt_laptop", GPT2, Layout(tp=2))
    printed = [run(*block, tmp_path) for block in BLOCKS[1:]]
    generated, exported, used, measured, chosen, imported, _ = printed
    # Libraries differ in how many replacement characters stand for bytes that are not UTF-8.
    texts = [re.split("[\ufffd\x00-\x1f]", text)[0] for text in (generated, used)]
    assert texts[0] == texts[1] != "def main("
    assert generated.startswith("def main(")
    assert re.search(r"logits differ by at most \d\.\de-0\d.* 0 of 2000 texts", exported)
    ours, theirs = re.findall(r"([\d.]+) bits/byte|bits_per_byte\D+([\d.]+)", measured)
    assert float(ours[0]) == pytest.approx(float(theirs[1]), abs=1e-4)
    accuracy = re.search(r"choices: acc ([\d.]+) .* of 8 items", chosen)
    assert accuracy is not None
    assert f"|{accuracy[1]}|" in chosen.replace(" ", "")
    assert "vocab_size: 603" in imported
    assert (tmp_path / "runs/imported/checkpoints/step_00000002").is_dir()
