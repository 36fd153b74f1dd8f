"""Pipeline parallelism: the schedule, its messages, and runs that equal those of one process."""

import dataclasses
import json
import math
import sys
import threading
import time
import weakref
from collections import defaultdict, deque
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints.full_tensors import read_full_tensor
from checkpoints.manifest import read_manifest
from configs import Config, parse_config
from data.rows import MicroBatch
from model import Sampling, build_model
from ops.dropout import dropout_keys
from parallel import Mesh, compare_replicas, gather_json, is_blocking_frame, run_pipeline
from parallel.pipeline import MAX_PENDING, Action, _Inbox, max_alive, schedule
from tests.distributed import ONE_RANK, Layout, distributed, run_on
from tests.runs import config_on, rows, settings, train_on
from tests.trained_runs import Dense, start_program
from tracking.summary import pipeline_problem
from train import start as start_run
from training.optimizer import training_tensors, weight_tensors
from training.run_folder import RunFolder
from training.state import Run, RunState, training_batches
from training.step import forward_backward, train_step

UNTIED = ("model.num_layers=5", "model.untie_embeddings_and_output_weights=true")
SHAPES = [(p, v) for p in (1, 2, 3, 5) for v in (1, 2, 3) if p > 1 or v == 1]


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5, 6, 11])
@pytest.mark.parametrize(("p", "v"), SHAPES)
def test_schedules(num_micro_batches: int, p: int, v: int) -> None:
    """Each action occurs once, backwards are in order, few micro-batches are alive; no deadlock."""
    m = num_micro_batches
    stages = schedule(m, p, v)
    for stage, actions in enumerate(stages):
        pairs = [(n, chunk) for n in range(m) for chunk in range(v)]
        assert sorted(actions) == [Action(f, *pair) for f in (False, True) for pair in pairs]
        for chunk in range(v):
            backwards = [one for one in actions if not one.is_forward and one.chunk == chunk]
            assert [one.micro_batch for one in backwards] == list(range(m))
        num_alive = most = 0
        for number, one in enumerate(actions):
            num_alive += 1 if one.is_forward else -1
            most = max(most, num_alive)
            assert one.is_forward or one._replace(is_forward=True) in actions[:number]
        assert most <= (p - stage if v == 1 else max_alive(p, v, stage))
    for num_ahead in (0, 1):  # of GPUs and CPUs
        _replay(stages, v, num_ahead)


def _replay(stages: tuple[tuple[Action, ...], ...], v: int, num_ahead: int) -> None:
    """Simulate the stages: messages must be received in the order in which they were sent.

    A send waits while MAX_PENDING earlier messages are unreceived; a stage receives `num_ahead`
    messages before it needs them. The order in which stages run does not matter, as each only reads
    and writes queues.
    """
    p, to_do = len(stages), [deque(actions) for actions in stages]
    queues: dict[tuple[int, bool], deque[tuple[int, int]]] = defaultdict(deque)  # of receivers

    def run(stage: int, action: Action) -> bool:
        piece, step = action.chunk * p + stage, 1 if action.is_forward else -1
        first, last = (0, p * v - 1)[::step]
        received = queues[stage, action.is_forward]
        sent = queues[(stage + step) % p, action.is_forward]
        if (piece != first and not received) or (
            piece != last and len(sent) == MAX_PENDING + num_ahead
        ):
            return False
        if piece != first:
            assert received.popleft() == (action.micro_batch, piece)
        if piece != last:
            sent.append((action.micro_batch, piece + step))
        return True

    while num_left := sum(map(len, to_do)):
        for stage, actions in enumerate(to_do):
            if actions and run(stage, actions[0]):
                actions.popleft()
        assert sum(map(len, to_do)) < num_left, "no stage can continue"
    assert not any(queues.values())


@distributed(Layout(pp=3), Layout(pp=3, chunks=2), Layout(pp=4), Layout(pp=2, chunks=2))
def test_a_group_has_one_kind_of_message(mesh: Mesh) -> None:
    """NCCL would let a send wait for an earlier receive of the same group."""
    found: dict[Any, set[tuple[str, int]]] = defaultdict(set)
    with pytest.MonkeyPatch.context() as patch:
        for name, peer in (("isend", "group_dst"), ("irecv", "group_src")):
            call = getattr(dist, name)

            def recorded(
                tensor: Tensor, *, call: Any = call, name: str = name, peer: str = peer, **to: Any
            ) -> Any:
                found[to["group"]].add((name, to[peer]))
                return call(tensor, **to)

            patch.setattr(f"parallel.pipeline.dist.{name}", recorded)
        shapes = [(2, 1, 4)] * 6

        def forward(n: int, chunk: int, x: Tensor | None) -> Tensor:
            x = torch.ones(shapes[n], requires_grad=True) if x is None else x
            is_last = mesh.is_last_stage and chunk == mesh.num_chunks - 1
            return (2 * x).sum() if is_last else 2 * x

        run_pipeline(mesh, shapes, torch.float32, forward, lambda *_: None)
    is_end = mesh.pp.rank in (0, mesh.pp.size - 1) and mesh.num_chunks == 1
    assert len(found) == (2 if is_end else 4)
    assert all(len(messages) == 1 for messages in found.values()), dict(found)


class _KeptForBackward(torch.autograd.Function):
    """The identity; keeps a token alive until backward has used the node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: "weakref.WeakSet[Any]") -> Tensor:
        ctx.token = type("Token", (), {})()
        alive.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@distributed(ONE_RANK, Layout(pp=2), Layout(pp=3), Layout(pp=2, chunks=2), Layout(pp=2, chunks=3))
@pytest.mark.parametrize("is_early", [False, True], ids=["as GPUs", "as CPUs"])
def test_gradients_equal_a_loop_bit_for_bit(mesh: Mesh, is_early: bool) -> None:
    """Micro-batches have different widths; stage r keeps at most p - r of them.

    GPUs post a receive when it is needed, CPUs one message earlier.
    """
    num_pieces, p = mesh.pp.size * mesh.num_chunks, mesh.pp.size
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n + 1, 1, 4, generator=generator) for n in range(7)]
    dense = [torch.randn(4, 4, generator=generator).requires_grad_() for _ in range(num_pieces)]
    own = [dense[chunk * p + mesh.pp.rank].detach().clone() for chunk in range(mesh.num_chunks)]
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def forward(n: int, chunk: int, x: Tensor | None) -> Tensor:
        nonlocal most
        x = inputs[n] if x is None else x
        y = _KeptForBackward.apply(x @ own[chunk], alive).tanh()
        most = max(most, len(alive))
        is_last = chunk * p + mesh.pp.rank == num_pieces - 1
        return y.square().sum() if is_last else y

    for weight in own:
        weight.requires_grad_()
    shapes = [tuple(x.shape) for x in inputs]
    make = _Inbox.__init__

    def with_choice(inbox: _Inbox, *arguments: Any, **_: bool) -> None:
        make(inbox, *arguments, is_early=is_early)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Inbox, "__init__", with_choice)
        run_pipeline(mesh, shapes, torch.float32, forward, lambda *_: None)
    for tokens in inputs:
        x = tokens
        for weight in dense:
            x = (x @ weight).tanh()
        x.square().sum().backward()
    for chunk, weight in enumerate(own):
        expected = dense[chunk * p + mesh.pp.rank].grad
        assert weight.grad is not None
        assert expected is not None
        assert torch.equal(weight.grad, expected)
    if mesh.num_chunks == 1:
        assert most == p - mesh.pp.rank


@pytest.mark.parametrize(
    ("layout", "option"),
    [
        (Layout(pp=2), "train.precision=fp32"),
        (Layout(pp=4), "train.precision=fp32"),
        (Layout(pp=3), "train.precision=bf16"),
        (Layout(pp=2, chunks=2), "parallel.recompute_granularity=full"),
    ],
    ids=str,
)
def test_stages_give_the_same_bits(
    corpus: Path, tmp_path: Path, layout: Layout, option: str
) -> None:
    """Six steps with dropout give the losses, norms, scores, samples and weights of one process."""
    for each, name in ((ONE_RANK, "one"), (layout, "stages")):
        train_on(each, settings(corpus, tmp_path, *UNTIED, option, f"run.name={name}"))
    assert rows(tmp_path, "stages") == rows(tmp_path, "one")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "stages")]
    assert _texts(samples[0]) == _texts(samples[1])
    one, stages = (
        read_manifest(tmp_path / name / "checkpoints" / "step_00000006")
        for name in ("one", "stages")
    )
    assert one.tensors.keys() == stages.tensors.keys()
    for name in one.tensors:
        assert torch.equal(read_full_tensor(one, name), read_full_tensor(stages, name)), name


def _texts(lines: str) -> list[Any]:
    return [
        {k: v for k, v in json.loads(line).items() if k != "time_s"}
        for line in lines.split("\n")
        if line
    ]


@pytest.mark.parametrize(
    ("layout", "gradient_sync"),
    [
        (Layout(pp=2), "step"),
        (Layout(tp=2, pp=2), "step"),
        (Layout(tp=2, sp=False, pp=2), "step"),
        (Layout(dp=2, pp=2), "step"),
        (Layout(dp=2, pp=2), "micro_batch"),
        (Layout(pp=3), "step"),
        (Layout(pp=2, chunks=2), "step"),
        (Layout(dp=2, pp=2, chunks=2), "step"),
        (Layout(cp=2, pp=2), "step"),
    ],
    ids=str,
)
def test_tied_stages_give_the_same_losses(
    corpus: Path, tmp_path: Path, layout: Layout, gradient_sync: str
) -> None:
    """Losses agree within 2e-6 over six steps, with rows of different widths."""
    options = (
        *("data.sequence_mode=pad", "model.num_layers=5", "debug.audit_interval=2"),
        f"parallel.gradient_sync={gradient_sync}",
    )
    for each, name in ((ONE_RANK, "one"), (layout, "stages")):
        train_on(each, settings(corpus, tmp_path, *options, f"run.name={name}"))
    _require_near(rows(tmp_path, "stages"), rows(tmp_path, "one"))


def _require_near(curve: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for row, other in zip(curve, expected, strict=True):
        for key, value in row.items():
            tolerance = 2e-5 if key == "train/grad_norm" else 2e-6
            assert value == pytest.approx(other[key], rel=tolerance), (row["step"], key)


@pytest.mark.slow
def test_checkpoints_fit_any_layout(corpus: Path, tmp_path: Path) -> None:
    """Written on pp=2 x tp=2 and read on other layouts; written on pp=4 and read on pp=2 x tp=2."""
    options = ("model.num_layers=4", "evaluate.interval=0")
    train_on(ONE_RANK, settings(corpus, tmp_path, *options, "run.name=whole"))
    whole = rows(tmp_path, "whole")
    both = Layout(tp=2, pp=2)
    for before, after in (
        (both, ONE_RANK),
        (both, Layout(dp=2)),
        (both, Layout(pp=4)),
        (Layout(pp=4), both),
    ):
        name = f"run.name={before}_{after}".replace("+", "")
        train_on(before, settings(corpus, tmp_path, *options, name, "run.stop_at_step=3"))
        train_on(after, settings(corpus, tmp_path, *options, name))
        _require_near(rows(tmp_path, name.removeprefix("run.name=")), whole)


def require_same_state(mesh: Mesh, config: Config, saved: Path) -> None:
    """Require that a launch reads the weights and moments that are in a checkpoint."""
    manifest = read_manifest(saved)
    with RunFolder(config, mesh) as folder:
        run, state = start_run(config, mesh, folder)
    assert state.step == 3
    tensors = training_tensors(run.model, run.optimizer)
    for name, shard in tensors.items():
        assert torch.equal(shard.tensor, read_full_tensor(manifest, name)[shard.slices]), name
    names = {name for of_rank in gather_json(mesh, list(tensors)) for name in of_rank}
    assert names == manifest.tensors.keys()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(tp=2, pp=2), (ONE_RANK, Layout(dp=2), Layout(pp=4))),
        (ONE_RANK, (Layout(tp=2, pp=2), Layout(pp=4))),
        (Layout(dp=2), (Layout(tp=2, pp=2), Layout(dp=2, pp=2, chunks=2))),
        (Layout(pp=4), (Layout(tp=2, pp=2),)),
    ],
    ids=str,
)
def test_any_layout_reads_weights_and_moments(
    corpus: Path, tmp_path: Path, before: Layout, after: tuple[Layout, ...]
) -> None:
    """Bit for bit, even a tied table, which the files store once."""
    options = ("model.num_layers=4", "evaluate.interval=0", "run.stop_at_step=3")
    arguments = settings(corpus, tmp_path, *options)
    train_on(before, arguments)
    saved = tmp_path / "test" / "checkpoints" / "step_00000003"
    for layout in after:
        config = config_on(layout, arguments)
        run_on(layout, require_same_state, config=config, saved=saved)


@pytest.mark.slow
def test_programs_read_a_pipeline_checkpoint(corpus: Path, tmp_path: Path) -> None:
    """generate.py equals the reference, evaluate.py the run, and export.py transformers."""
    train_on(Layout(tp=2, pp=2), settings(corpus, tmp_path, "model.num_layers=3"))
    run, prompt = tmp_path / "test", "while True"
    text = Dense(run).continuation(prompt, 20, Sampling(temperature=0.0))
    arguments = (f"run={run}", f"prompt={prompt}", "max_new_tokens=20", "temperature=0")
    assert start_program(1, "generate.py", *arguments) == (0, (prompt + text).encode())
    code, scores = start_program(1, "evaluate.py", f"run={run}")
    (during,) = [row for row in rows(tmp_path) if row["step"] == 6 and "eval/loss" in row]
    assert (code, f"{during['eval/bits_per_byte']:.4f} bits/byte" in scores.decode()) == (0, True)
    code, output = start_program(1, "export.py", f"run={run}", f"output={tmp_path / 'exported'}")
    assert code == 0, output
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@distributed(ONE_RANK, Layout(pp=2), Layout(pp=3))
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_stage_saves_what_its_alive_micro_batches_need(
    mesh: Mesh, config: Config, recompute: Any
) -> None:
    """p - r times the bytes that autograd saves for one micro-batch, however many there are."""
    parallel = dataclasses.replace(config.parallel, recompute_granularity=recompute)
    config = dataclasses.replace(config, parallel=parallel)
    model = build_model(config, mesh)
    run = cast(Run, SimpleNamespace(config=config, mesh=mesh, model=model))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    keys = dropout_keys(0, 0, range(2), config.model.num_layers)
    one = MicroBatch(tokens, tokens, tokens, torch.arange(2), 16, None, keys)
    num_bytes = most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal num_bytes, most
            self.tensor = tensor.detach()  # the tensor itself could keep its node alive
            num_bytes += tensor.nbytes
            most = max(most, num_bytes)

        def __del__(self) -> None:
            nonlocal num_bytes
            num_bytes -= self.tensor.nbytes

    def peak(num_micro_batches: int) -> int:
        nonlocal most
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            forward_backward(run, RunState(wandb_id=""), [one] * num_micro_batches, 1.0)
        assert num_bytes == 0
        return most

    assert peak(7) == (mesh.pp.size - mesh.pp.rank) * peak(1)


@distributed(Layout(pp=2))
def test_all_stages_skip_a_step(mesh: Mesh, config: Config) -> None:
    """A gradient on the first stage is not finite, although the loss is."""
    with RunFolder(config, mesh) as folder:
        run, state = start_run(config, mesh, folder)
        weight = next(run.model.parameters())
        before = weight.detach().clone()
        if mesh.pp.rank == 0:
            weight.register_hook(lambda grad: grad * math.inf)
        with training_batches(run, state) as batches:
            result = train_step(run, state, batches)
    assert math.isfinite(result.loss)
    assert result.why_skipped is not None
    assert torch.equal(weight, before)


@distributed(Layout(pp=3))
def test_copies_of_a_tied_table_are_compared(mesh: Mesh, config: Config) -> None:
    model = build_model(config, mesh)
    tensors = weight_tensors(model)
    assert not compare_replicas(model, tensors, mesh)
    if mesh.is_last_stage:
        tensors["parameters.embedding.weight"].tensor[0, 0] += 1
    (found,) = compare_replicas(model, tensors, mesh)
    assert found == "parameters.embedding.weight on rank 0, 2 (of pp ranks [0, 2])"


def main_thread_waits() -> bool:
    """Whether it is in a function that waits for other ranks."""
    frame: FrameType | None = sys._current_frames()[threading.main_thread().ident or 0]
    while frame is not None and not is_blocking_frame(frame.f_code):
        frame = frame.f_back
    return frame is not None


@distributed(Layout(pp=2))
def test_a_waiting_stage_is_not_blamed(mesh: Mesh) -> None:
    """While the first stage is slow, the watchdog sees that the last one waits."""
    is_slow, is_seen, has_ended = (threading.Event() for _ in range(3))
    seen: list[bool] = []

    def forward(n: int, chunk: int, x: Tensor | None) -> Tensor:
        if mesh.pp.rank == 0:
            is_slow.set()
            is_seen.wait(60)
            time.sleep(0.5)
        weight = torch.ones(1, requires_grad=True)
        return weight if x is None else (x * weight).sum()

    def watch() -> None:
        if mesh.pp.rank == 0:
            is_slow.wait(60)
            seen.append(main_thread_waits())
            is_seen.set()
        while mesh.is_last_stage and not any(seen) and not has_ended.wait(0.01):
            seen.append(main_thread_waits())

    watching = threading.Thread(target=watch)
    gather_json(mesh, "all ranks begin together")
    watching.start()
    run_pipeline(mesh, [(1,)], torch.float32, forward, lambda *_: None)
    has_ended.set()
    watching.join()
    assert any(seen) == mesh.is_last_stage


@distributed(Layout(pp=4), Layout(pp=4, chunks=2))
def test_ranks_have_equally_many_groups(mesh: Mesh) -> None:
    """torch hashes that number into names of groups: with others, a later mesh would hang."""
    numbers = gather_json(mesh, len(dist.distributed_c10d._world.pg_names))
    assert len(set(numbers)) == 1, numbers
    assert mesh.tied.size == (1 if mesh.pp.rank in (1, 2) else 2)


@distributed(Layout(pp=3))
def test_fewer_micro_batches_than_stages_are_reported(mesh: Mesh, config: Config) -> None:
    """The warning says for which fraction of a step the stages are idle."""
    train = dataclasses.replace(config.train, global_batch_size=4)
    run = SimpleNamespace(config=dataclasses.replace(config, train=train), mesh=mesh)
    problem = pipeline_problem(cast(Run, run))
    assert problem is not None
    assert "2 micro-batches per step are fewer than the 3 stages" in problem
    assert "idle for 50% of each step" in problem
    run.config = config  # of 4 micro-batches
    assert pipeline_problem(cast(Run, run)) is None


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """A run on two stages."""
    config = parse_config(settings(corpus, tmp_path, "train.compile=false"))
    parallel = dataclasses.replace(config.parallel, pipeline_model_parallel_size=2)
    return dataclasses.replace(config, parallel=parallel)
