"""Compiled pointwise functions give the same results as eager ones."""

import dataclasses
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from configs import ModelConfig
from model.context import apply_rotary
from model.mlp import swiglu
from model.norm import rms_norm
from ops.compile import compiler_problem, maybe_compile
from ops.dropout import keep_mask, site_index
from parallel import Mesh, dropout_add
from parallel.mesh import _all_can_compile
from tests.distributed import ONE_RANK, Layout, distributed
from tests.model.test_gpt import OPTIONS, STREAM, TINY, batch, tiny_model
from tests.parallel.test_mappings import seeded
from tests.runs import finish, rows, settings, start
from tests.streams import stream
from tests.weights import gradient_shards

pytestmark = pytest.mark.timeout(900)  # compiling is slow the first time on a machine

CPU = torch.device("cpu")
needs_a_compiler = pytest.mark.usefixtures("can_compile")
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-5), ((6, 2, 48), (48,))),
    "swiglu": (swiglu, ((6, 2, 40), (6, 2, 40))),
    "apply_rotary": (apply_rotary, ((6, 2, 4, 16), (6, 2, 1, 8), (6, 2, 1, 8))),
}


@pytest.fixture(scope="module")
def can_compile() -> None:
    """Skip where nothing can be compiled."""
    if (problem := compiler_problem(CPU)) is not None:
        pytest.skip(f"cannot compile: {problem}")


def outcome(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradient of each input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(name: str, dtype: torch.dtype) -> None:
    """Forward and every gradient against float64, within one or two roundings."""
    function, shapes = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    expected = outcome(function, [tensor.double() for tensor in inputs])
    compiled = maybe_compile(function, compile=True)
    assert compiled is not function
    got = outcome(compiled, inputs)
    assert len(got) == len(expected) == 1 + len(shapes)
    tolerance = 2 * torch.finfo(dtype).eps
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        scale = reference.abs().max().item()
        assert_close(mine.double(), reference, rtol=tolerance, atol=2 * tolerance * scale)


@pytest.mark.slow
@needs_a_compiler
@distributed(ONE_RANK, Layout(tp=2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("rate", [0.3, 0.1])
def test_compiled_dropout_has_the_same_mask(
    mesh: Mesh, dtype: torch.dtype, has_residual: bool, rate: float
) -> None:
    """Compiled sums may be rounded once less; at the second rate, torch might reuse a kernel."""
    x, residual = torch.randn(2, 6, 2, 32).to(dtype).unbind()
    results = [
        outcome(
            lambda x, residual, compile=compile: dropout_add(
                x,
                residual if has_residual else None,
                rate,
                stream(1, 2, (3, 4)),
                0,
                1,
                dataclasses.replace(mesh, compile=compile),
            ),
            [x, residual],
        )
        for compile in (False, True)
    ]
    for plain, compiled in zip(*results, strict=True):
        eps = torch.finfo(dtype).eps
        assert_close(compiled, plain, rtol=2 * eps, atol=2 * eps)
    _, plain_grad, *_ = results[0]
    _, compiled_grad, *_ = results[1]
    assert torch.equal(plain_grad == 0, compiled_grad == 0)
    assert (plain_grad == 0).any()


@needs_a_compiler
@distributed(ONE_RANK)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_dropout_gradient_is_right_in_any_thread(
    mesh: Mesh, has_residual: bool, dtype: torch.dtype
) -> None:
    """On CUDA, backward runs in autograd's thread; compiler settings are per thread."""
    mesh = dataclasses.replace(mesh, compile=True)
    masks = stream(1, 2, (3, 4))
    assert masks.keys is not None
    for rate in (0.3, 0.1, 0.5):
        x, residual = torch.ones(2, 64, 2, 96, dtype=dtype).unbind()
        x.requires_grad_()
        residual = residual if has_residual else None
        y = dropout_add(x, residual, rate, masks, 0, 1, mesh)
        thread = threading.Thread(target=y.backward, args=(torch.ones_like(y),))
        thread.start()
        thread.join()
        kept = keep_mask(x.shape, 0, rate, masks.keys[site_index(0, 1)])
        assert torch.equal(x.grad, (kept / (1 - rate)).to(dtype)), rate


@pytest.mark.slow
@needs_a_compiler
@distributed(ONE_RANK)
def test_compiled_norm_uses_each_epsilon_in_any_thread(mesh: Mesh) -> None:
    """Full recomputation runs the forward of a norm in autograd's thread."""
    compiled = maybe_compile(rms_norm, compile=True)
    x, weight = seeded(1, 6, 2, 48), seeded(2, 48)
    for epsilon in (1e-5, 0.5, 1e-2):
        expected = outcome(partial(rms_norm, epsilon=epsilon), [x.double(), weight.double()])
        results: list[list[Tensor]] = []

        def run(epsilon: float = epsilon, results: list[list[Tensor]] = results) -> None:
            results.append(outcome(partial(compiled, epsilon=epsilon), [x, weight]))

        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert len(results) == 2
        for result in results:
            for mine, reference in zip(result, expected, strict=True):
                assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


def model_outcome(mesh: Mesh, config: ModelConfig, recompute: str) -> list[Tensor]:
    """The loss and all gradients."""
    model = tiny_model(mesh, config, recompute)
    block = model.blocks[0]
    chains = (block.mlp.activation, block.attention.apply_rotary, block.attention_norm.rms_norm)
    for chain, plain in zip(chains, (swiglu, apply_rotary, rms_norm), strict=True):
        assert (chain is plain) != mesh.compile
    losses = model(*batch(), STREAM)
    losses.objective.backward()
    gradients = [shard.tensor for shard in gradient_shards(model).values()]
    return [losses.cross_entropy.detach(), *gradients]


@needs_a_compiler
@distributed(Layout(tp=2, overlap="backward"), ONE_RANK)  # two ranks compile the same kernels
@pytest.mark.parametrize(
    "recompute",
    ["none", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("selective", "full"))],
)
def test_a_compiled_model_has_the_same_gradients(mesh: Mesh, recompute: str) -> None:
    config = dataclasses.replace(TINY, **OPTIONS["llama"])
    plain = model_outcome(mesh, config, recompute)
    compiled = model_outcome(dataclasses.replace(mesh, compile=True), config, recompute)
    for mine, reference in zip(compiled, plain, strict=True):
        scale = reference.abs().max().item()
        assert_close(mine, reference, rtol=1e-5, atol=1e-6 * scale)


@needs_a_compiler
@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/bin/false", r"/bin/false failed in \S+, exit code 1: no message \(install a compiler"),
        ("/bin/true", r"/bin/true failed in \S+, exit code 0"),  # it writes nothing
    ],
)
def test_a_compiler_that_does_not_work(
    compiler: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is run even if kernels are cached."""
    assert compiler_problem(CPU) is None
    monkeypatch.setenv("CXX", compiler)
    assert re.match(message, compiler_problem(CPU) or "")


@needs_a_compiler
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache is not a directory, not writable, or has too little space."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/cache"))
    assert re.search(r"Not a directory.*TORCHINDUCTOR_CACHE_DIR", compiler_problem(CPU) or "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc")  # root, too, can write nothing there
    assert re.search(r"/proc/try_.*TORCHINDUCTOR_CACHE_DIR", compiler_problem(CPU) or "")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=255 << 20)):
        assert compiler_problem(CPU) == f"{tmp_path} has only 255 MiB free"
    assert compiler_problem(CPU) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@distributed(Layout(dp=2))
@pytest.mark.parametrize("broken", [None, 0, 1])
def test_ranks_compile_together_or_not_at_all(mesh: Mesh, broken: int | None) -> None:
    """Only the first rank that cannot logs a warning."""
    rank = mesh.world.rank
    problem = "broken" if rank == broken else None
    with (
        mock.patch("parallel.mesh.compiler_problem", return_value=problem),
        mock.patch("parallel.mesh.logger.warning") as warning,
    ):
        assert _all_can_compile(CPU) == (broken is None)
    assert warning.call_count == (rank == broken)


@pytest.mark.slow
def test_a_run_without_a_working_compiler(corpus: Path, tmp_path: Path) -> None:
    """The run trains without compiling and warns once."""
    arguments = settings(
        corpus, tmp_path, "train.train_steps=2", "train.compile=true", "evaluate.interval=0"
    )
    with mock.patch.dict("os.environ", {"CXX": "/bin/false"}):
        output = finish(start(2, arguments))
    (warning,) = re.findall("train.compile is off on all ranks.*", output)
    assert "rank 0 cannot compile: /bin/false failed" in warning
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    problem = compiler_problem(CPU)
    assert problem is not None
    assert "no-such-compiler" in problem
    assert "CXX" in problem
