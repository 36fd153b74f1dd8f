"""Matmuls and attention in the fast dtype of the device equal exact ones."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ops import matmul
from ops.sdpa import sdpa
from ops.segments import make_key_blocks
from tests.reference import document_numbers

ROWS, INNER, COLUMNS = 24, 40, 16


def exact(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Random numbers representable in the dtype, as float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).double()


@pytest.fixture(params=["native", "widened"])
def each_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    previous = matmul.use_precision(matmul.Precision(request.param, request.param))
    yield
    matmul.use_precision(previous)


@pytest.mark.usefixtures("each_precision")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_is_exact_up_to_one_rounding(dtype: torch.dtype) -> None:
    """Forward and every gradient against float64, with a single rounding to the dtype."""
    x = exact(3, ROWS, INNER, seed=1, dtype=dtype).requires_grad_()
    weight = exact(COLUMNS, INNER, seed=2, dtype=dtype).requires_grad_()
    bias = exact(COLUMNS, seed=3, dtype=dtype).requires_grad_()
    grad = exact(3, ROWS, COLUMNS, seed=4, dtype=dtype)
    (x @ weight.t() + bias).backward(grad)
    mine = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight, bias)]
    y = matmul.linear(*mine)
    y.backward(grad.to(dtype))

    # Half a unit in the last place, and the error of a float32 sum of up to 72 terms.
    close = {"rtol": torch.finfo(dtype).eps, "atol": 2e-5}
    expected = (x @ weight.t() + bias).detach()
    torch.testing.assert_close(y.double(), expected, **close)
    for tensor, reference in zip(mine, (x, weight, bias), strict=True):
        assert tensor.grad is not None
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(tensor.grad.double(), reference.grad, **close)


def test_matmuls_and_attention_have_their_own_precision() -> None:
    """Only bf16 on a CPU is widened."""
    x, wide = torch.ones(2, dtype=torch.bfloat16), torch.float32
    for choices, dtypes in {
        ("native", "widened"): (x.dtype, wide),
        ("widened", "native"): (wide, x.dtype),
    }.items():
        previous = matmul.use_precision(matmul.Precision(*choices))
        found = [(matmul.matmul_dtype(y), matmul.attention_dtype(y)) for y in (x, x.to("meta"))]
        assert matmul.matmul_dtype(x.double()) == torch.float64
        matmul.use_precision(previous)
        assert found == [dtypes, (x.dtype, x.dtype)]
    with pytest.raises(ValueError, match="is not one of"):
        matmul.Precision("fast", "native")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_environment_does_not_lower_the_precision() -> None:
    """NVIDIA's containers set a variable that would allow TF32 for float32 matmuls."""
    program = (
        "import torch; from parallel import init_mesh; init_mesh(1, False);"
        "print(torch.get_float32_matmul_precision())"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert printed.stdout.split() == ["highest"]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v."""
    heads_per_group = q.shape[2] // k.shape[2]
    k, v = (heads.repeat_interleave(heads_per_group, dim=2) for heads in (k, v))
    scores = torch.einsum("ibad,jbad->baij", q, k) / q.shape[-1] ** 0.5
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("baij,jbad->ibad", probabilities, v)


@pytest.mark.usefixtures("each_precision")
@pytest.mark.parametrize("begins", [[0], [0, 7], [0, 1, 2, 18]], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_equals_the_formula(dtype: torch.dtype, groups: int, begins: list[int]) -> None:
    """Forward and every gradient, with shared keys and values and with documents."""
    s, b, heads, d = 19, 2, 4, 8
    documents = [[0], begins]
    numbers = document_numbers(documents, s)
    mask = (numbers[:, :, None] == numbers[:, None]).tril().unsqueeze(1)  # [b, 1, s, s]
    tensors = [exact(s, b, n, d, seed=n, dtype=dtype).requires_grad_() for n in (heads, groups)]
    tensors.append(exact(s, b, groups, d, seed=9, dtype=dtype).requires_grad_())
    grad = exact(s, b, heads, d, seed=8, dtype=dtype)
    expected = dense_attention(*tensors, mask)
    expected.backward(grad)
    mine = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    y = sdpa(*mine, make_key_blocks(s, documents)[0].segments, 0.0)
    y.backward(grad.to(dtype))

    assert y.is_contiguous()
    unit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=2 * unit, atol=2 * unit)
    for tensor, reference in zip(mine, tensors, strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=0, atol=8 * unit)
