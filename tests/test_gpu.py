"""What only a GPU can show: `make test-gpu`. Skipped without one."""

import os
from pathlib import Path

import pytest
import torch

from ops.dropout import dropout_keys, keep_mask, site_index
from ops.matmul import add_matmul_, matmul_fp32
from tests.runs import finish, rows, settings, start
from tests.test_train_layouts import LLAMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_masks_are_those_of_the_processor() -> None:
    """The hash is integer arithmetic: the same bits on every device."""
    keys, shape = dropout_keys(1, 2, (3, 4), 1)[site_index(0, 1)], torch.Size((64, 2, 96))
    masks = [keep_mask(shape, 7, 0.1, keys.to(device)).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*masks)


def test_products_in_float32_are_not_rounded() -> None:
    """Of bfloat16 matrices, as the head makes its logits and adds up the gradient of its weight."""
    a, b = torch.randn(48, 64).bfloat16(), torch.randn(64, 40).bfloat16()
    expected = a.double() @ b.double()
    product = matmul_fp32(a.cuda(), b.cuda())
    total = torch.ones(48, 40, device="cuda")
    add_matmul_(total, a.cuda(), b.cuda())
    for mine, reference in ((product, expected), (total, 1 + expected)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.cpu().double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [(), LLAMA], ids=["gpt", "llama"])
def test_float32_losses_are_those_of_the_processor(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Six steps with dropout: the same weights, masks and samples; sums in another order."""
    curves = {}
    for name, visible in (("gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "0")), ("cpu", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        finish(start(1, settings(corpus, tmp_path, *options, f"run.name={name}")))
        curves[name] = [row["train/loss"] for row in rows(tmp_path, name) if "train/loss" in row]
    assert curves["gpu"] == pytest.approx(curves["cpu"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deterministic_kernels_repeat_to_the_bit(
    corpus: Path, tmp_path: Path, precision: str
) -> None:
    """The same run twice, with debug.deterministic: every loss and norm the same."""
    curves = []
    for name in ("first", "second"):
        overrides = (f"run.name={name}", f"train.precision={precision}", "debug.deterministic=true")
        finish(start(1, settings(corpus, tmp_path, *overrides)))
        curves.append(rows(tmp_path, name))
    assert curves[0] == curves[1]


@pytest.mark.parametrize("options", [(), LLAMA], ids=["gpt", "llama"])
def test_bf16_trains_and_resumes(corpus: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The loss falls; stopped and resumed, with recomputation, the run goes on where it was.

    It saves in the background at every step.
    """
    arguments = settings(
        corpus,
        tmp_path,
        *options,
        "train.precision=bf16",
        "parallel.recompute_granularity=full",
        "checkpoint.save_interval=1",
    )
    finish(start(1, [*arguments, "run.stop_at_step=3"]))
    finish(start(1, arguments))
    curve = rows(tmp_path)
    assert [row["step"] for row in curve] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert curve[-2]["train/loss"] < 0.95 * curve[0]["train/loss"]
