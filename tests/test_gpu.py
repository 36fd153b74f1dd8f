"""What only a GPU can show; skipped without one. Other tests run on GPUs too: `make test-gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import synchronizations
from ops.dropout import dropout_keys, keep_mask
from ops.matmul import add_matmul_, matmul_fp32
from tests.runs import finish, rows, settings, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_masks_are_those_of_the_cpu() -> None:
    """The hash is integer arithmetic: the same bits on every device."""
    keys = dropout_keys(1, 2, (3, 4), 1)[1]
    shape = torch.Size((64, 2, 96))
    masks = [keep_mask(shape, 7, 0.1, keys.to(device)).cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*masks)


def test_products_in_float32_are_not_rounded() -> None:
    """Of bfloat16 matrices, as for the logits and for the gradient of the head's weight."""
    a, b = torch.randn(48, 64).bfloat16(), torch.randn(64, 40).bfloat16()
    expected = a.double() @ b.double()
    product = matmul_fp32(a.cuda(), b.cuda())
    total = torch.ones(48, 40, device="cuda")
    add_matmul_(total, a.cuda(), b.cuda())
    for mine, reference in ((product, expected), (total, 1 + expected)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.cpu().double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deterministic_kernels_repeat_to_the_bit(
    corpus: Path, tmp_path: Path, precision: str
) -> None:
    """The same run twice, with debug.deterministic: every loss and norm is the same."""
    curves: list[list[dict[str, Any]]] = []
    for name in ("first", "second"):
        overrides = (f"run.name={name}", f"train.precision={precision}", "debug.deterministic=true")
        finish(start(1, settings(corpus, tmp_path, *overrides)))
        curves.append(rows(tmp_path, name))
    assert curves[0] == curves[1]


@pytest.mark.parametrize("config", ["gpt_debug", "llama_debug"])
@pytest.mark.parametrize("compile", ["true", "false"])
def test_a_step_does_not_synchronize(config: str, compile: str) -> None:
    """It passes under torch.cuda.set_sync_debug_mode("error"); its one wait is explicit."""
    assert synchronizations([f"config={config}.yaml", f"train.compile={compile}"]) == []
