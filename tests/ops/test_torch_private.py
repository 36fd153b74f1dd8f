"""torch's private APIs do what we rely on; `make test-torch` tries several versions."""

import ast
import math
import sys
import threading
from collections.abc import Container, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close

from ops import torch_dry_run, torch_private
from ops.torch_dry_run import (
    CAST,
    ITEM,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    arguments_by_name,
    call_after_backward,
    forget_sharding_rules,
    init_fake_process_group,
    is_sharding_rule,
    operator_name,
)
from ops.torch_private import (
    ALL_GATHER,
    OTHER_COLLECTIVES,
    REDUCE_SCATTER,
    ProcessGroupGloo,
    all_gather_single,
    compile_with_limit,
    completed_work,
    current_saved_tensors_hooks,
    flash_attention_on_cpu,
    flash_attention_on_cpu_backward,
    flash_varlen_on_cuda,
    flash_varlen_on_cuda_backward,
    foreach_copy_,
    foreach_mul_,
    foreach_norm,
    group_by_name,
    kernel_cache_dir,
    make_gloo,
    reduce_scatter_single,
    register_backend,
    storage_id,
)
from parallel import Mesh
from tests.distributed import Layout, distributed
from tests.lines import ROOT, nodes, source_files

PRIVATE = Path(torch_private.__file__).relative_to(ROOT)
OF_DRY_RUNS = Path(torch_dry_run.__file__).relative_to(ROOT)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_name(node: ast.AST, names: Container[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _private_names(file: Path) -> Iterator[str]:
    """Private names of other libraries, except Python's, that a file uses."""
    own = {n.name for n in nodes(file) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    attributes = [node for node in nodes(file) if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if _is_name(node.value, ("self", "cls"))}
    for node in nodes(file):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (
            n for n in imported if n.startswith("torch") and any(map(_is_private, n.split(".")))
        )
    for node in attributes:
        is_python = _is_name(node.value, ("os", "sys"))
        if _is_private(node.attr) and node.attr not in own and not is_python:
            yield ast.unparse(node)


def test_private_names_are_in_two_files() -> None:
    """Except in bench/peers, for the other trainers' own."""
    for file in source_files():
        if file not in (PRIVATE, OF_DRY_RUNS) and file.parts[:2] != ("bench", "peers"):
            assert not list(_private_names(file)), file
    assert "torch._C._autograd._top_saved_tensors_default_hooks" in _private_names(PRIVATE)
    assert "torch._subclasses.fake_tensor.FakeTensor" in _private_names(OF_DRY_RUNS)


@pytest.mark.parametrize("is_causal", [True, False])
def test_flash_attention(is_causal: bool) -> None:
    """Forward, and backward from what forward returns, equal the formula."""
    q, k, v, grad_y = torch.randn(4, 2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    options = {"is_causal": is_causal, "attn_mask": None if is_causal else mask}
    y, log_sum_exp = flash_attention_on_cpu(q, k, v, 0.0, **options)
    grads = flash_attention_on_cpu_backward(grad_y, q, k, v, y, log_sum_exp, 0.0, **options)
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT / math.sqrt(8) + mask
    expected = scores.softmax(-1) @ leaves[2]
    expected.backward(grad_y.double())
    for mine, reference in zip(
        (y, *grads), (expected, *(leaf.grad for leaf in leaves)), strict=True
    ):
        assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


def test_flash_attention_for_sequences_of_any_lengths() -> None:
    """Only arguments and shapes; tests/ops/test_segments.py compares values on a GPU."""
    with FakeTensorMode():
        q, k, v = (torch.empty(n, 4, 8, dtype=torch.bfloat16, device="cuda") for n in (5, 7, 7))
        of_queries, of_keys = (torch.empty(3, dtype=torch.int32, device="cuda") for _ in range(2))
        seed = torch.empty(0, dtype=torch.int64, device="cuda")
        lengths = of_queries, of_keys, 4, 6
        y, log_sum_exp = flash_varlen_on_cuda(q, k, v, *lengths, 0.0, False, False)[:2]
        forward = (y, q, k, v, y, log_sum_exp, *lengths, 0.0, False, seed, seed)
        grads = flash_varlen_on_cuda_backward(*forward)
    assert (log_sum_exp.shape, log_sum_exp.dtype) == ((4, 5), torch.float32)
    assert [tensor.shape for tensor in (y, *grads)] == [q.shape, q.shape, k.shape, v.shape]
    assert str(flash_varlen_on_cuda._schema).startswith(
        "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
        "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
        "bool return_debug_mask, "
    )
    assert str(flash_varlen_on_cuda_backward._schema).startswith(
        "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
        "Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, "
        "SymInt max_k, float dropout_p, bool is_causal, "
    )


def test_foreach() -> None:
    """The norm is accumulated in the requested dtype."""
    tensors = [torch.full((n,), 1e30) for n in (2, 3)]
    norms = foreach_norm(tensors, 2, dtype=torch.float64)
    expected = [tensor.double().norm() for tensor in tensors]
    assert_close(list(norms), expected)
    foreach_mul_(tensors, 0.5)
    assert all((tensor == 5e29).all() for tensor in tensors)
    foreach_copy_(tensors, [torch.ones(2), torch.zeros(3)])
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], [0, 0, 0]]


class Log(TorchDispatchMode):
    """The operations inside, on plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(of_argument, DTensor) for of_argument in types):
            return NotImplemented
        self.calls.append((func, arguments_by_name(func, args, kwargs), is_sharding_rule()))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_operations_by_name() -> None:
    x = torch.ones(())
    with Log() as log:
        x.double()
        x.item()
    (cast, cast_arguments, _), (item, item_arguments, _) = log.calls
    assert (cast, item) == (CAST, ITEM)
    assert [operator_name(cast), operator_name(item)] == ["_to_copy", "_local_scalar_dense"]
    assert cast_arguments == {"self": x, "dtype": torch.float64}
    assert item_arguments == {"self": x}


def test_fake_tensors_have_a_shape_and_no_memory() -> None:
    with FakeTensorMode() as fake:
        x = torch.empty(1 << 30, 1 << 20)
        y = x.sum(dim=1)
    assert isinstance(y, FakeTensor)
    assert y.fake_mode is fake
    assert y.shape == (1 << 30,)
    assert storage_id(x) == storage_id(x[1:])
    assert storage_id(x) != storage_id(y)


def test_storage_id_identifies_storages() -> None:
    for device in ("cpu", "meta"):
        x, y = torch.empty(2, 4, 4, device=device).clone().unbind()
        assert storage_id(x) == storage_id(y) == storage_id(y.view(-1)[3:])
        assert storage_id(x) != storage_id(x.clone())


def test_current_hooks_are_the_innermost() -> None:
    x = torch.ones(3)
    pack, unpack = current_saved_tensors_hooks()
    assert pack(x) is x
    assert unpack(x) is x
    hooks = torch.autograd.graph.saved_tensors_hooks
    outer, inner = [(lambda tensor, n=n: (n, tensor), lambda saved: saved[1]) for n in (1, 2)]
    with hooks(*outer):
        with hooks(*inner):
            assert current_saved_tensors_hooks() == inner
        assert current_saved_tensors_hooks() == outer


def test_call_after_backward() -> None:
    """Every gradient is complete by then."""
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 3).sum()
    seen: list[Tensor] = []

    def note() -> None:
        assert weight.grad is not None
        seen.append(weight.grad.clone())

    loss.register_hook(lambda _: call_after_backward(note))
    loss.backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.full((2,), 3.0))


def test_the_recompile_limit_holds_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than torch's default of 8, and up to the limit only."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = compile_with_limit(lambda x, name: x + len(name), 12)
    results: list[float] = []

    def call(*lengths: int) -> None:
        results.extend(compiled(torch.zeros(1), "x" * length).item() for length in lengths)

    call(*range(6))
    thread = threading.Thread(target=call, args=range(6, 12))
    thread.start()
    thread.join()
    assert results == [*range(12)]
    with pytest.raises(Exception, match="Hard failure"):
        call(12)


def test_the_kernel_cache_is_where_its_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    assert kernel_cache_dir() == str(tmp_path / "kernels")
    assert (tmp_path / "kernels").is_dir()


class Overriding(dist.ProcessGroup):
    """A group that logs the names of the methods that torch.distributed calls."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self.called: list[str] = []


for _name in (ALL_GATHER, REDUCE_SCATTER, "allreduce", *OTHER_COLLECTIVES):

    def _log(self: Overriding, *_: Any, name: str = _name, opts: Any = None) -> dist.Work:
        self.called.append(name)
        return completed_work([])

    setattr(Overriding, _name, _log)


def test_a_python_group_overrides_every_collective() -> None:
    """If torch called other names, they would reach gloo from C++."""
    group, x = Overriding(), torch.ones(2)
    all_gather_single(x, x, group=group)
    reduce_scatter_single(x, x, group=group)
    dist.all_reduce(x, group=group)
    assert group.called == [ALL_GATHER, REDUCE_SCATTER, "allreduce"]
    group.called.clear()
    dist.all_gather([x], x, group=group)
    dist.reduce_scatter(x, [x], group=group)
    dist.broadcast(x, group=group, group_src=0)
    dist.barrier(group=group)
    dist.all_to_all_single(x, x, group=group)
    assert len(group.called) == 5
    assert set(group.called) < set(OTHER_COLLECTIVES)
    assert {"send", "recv", "allreduce_coalesced"} < set(OTHER_COLLECTIVES)


def test_completed_work() -> None:
    x = torch.ones(2)
    work = completed_work([x])
    assert work.is_completed()
    assert work.wait()
    assert work.get_future().wait()[0] is x


def test_a_group_computes_with_its_registered_backend() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    gloo = make_gloo(store, 0, 1, timedelta(seconds=10))
    assert isinstance(gloo, ProcessGroupGloo)
    group = dist.ProcessGroup(store, 0, 1)
    register_backend(group, gloo, "ours")
    assert group.group_name == "ours"
    x = torch.ones(2)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@distributed(Layout(dp=2), Layout(tp=2, shared_memory=True))
def test_groups_share_the_thread_that_receives(mesh: Mesh) -> None:
    """A new group has only the two threads that it computes with.

    With one more it would wake up 100 times per second, and a mesh has up to 13 groups.
    """
    assert mesh.tp.group is not mesh.dp.group
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir()))
    group = dist.new_group()
    assert len(list(tasks.iterdir())) == before + 2
    dist.destroy_process_group(group)


@distributed(Layout(dp=2), Layout(tp=2, shared_memory=True))
def test_collectives_on_one_tensor(mesh: Mesh) -> None:
    """Synchronous and asynchronous; and a group is found by its name."""
    group, rank = mesh.world.group, mesh.world.rank
    assert group_by_name(group.group_name) is group
    gathered, scattered = torch.empty(4), torch.empty(2)
    all_gather_single(gathered, torch.full((2,), float(rank)), group=group)
    assert gathered.tolist() == [0, 0, 1, 1]
    work = reduce_scatter_single(scattered, torch.arange(4.0), group=group, async_op=True)
    work.wait()
    assert scattered.tolist() == [[0, 2], [4, 6]][rank]


def test_a_later_fake_rank_has_its_own_mesh() -> None:
    """DTensor's caches would return an earlier mesh for equal tensors."""
    for rank in (0, 5):
        init_fake_process_group(8, rank)
        try:
            mesh = init_device_mesh("cpu", (8,))
            x = DTensor.from_local(torch.ones(4), mesh, [Shard(0)])
            assert x.detach().device_mesh.get_local_rank() == rank
        finally:
            dist.destroy_process_group()
            forget_sharding_rules()


def test_fake_collectives_return_at_once() -> None:
    """DTensor's operations on global tensors are distinguished from those on local ones."""
    init_fake_process_group(8)
    try:
        assert (dist.get_rank(), dist.get_world_size()) == (0, 8)
        dist.all_reduce(torch.ones(2))
        mesh = init_device_mesh("cpu", (8,))
        local = torch.ones(4)
        x = DTensor.from_local(local, mesh, [Shard(0)])
        with Log() as log:
            torch.mul(x, 3.0)
        of_products = [(a["self"].shape, rule) for _, a, rule in log.calls if "self" in a]
        assert of_products == [((32,), True), ((4,), False)]
    finally:
        dist.destroy_process_group()
