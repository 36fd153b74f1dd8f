"""Copies that part are found, tensor and ranks named; copies that agree are left alone."""

import dataclasses
import json

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from configs import Config, OptimizerConfig, parse_config
from model import GPT
from parallel import Mesh, clip_gradients, compare_replicas, sum_partial_gradients
from tests.distributed import EVERY_LAYOUT, Layout, distributed
from tests.model.test_gpt import OPTIONS, STREAM, TINY, batch, tiny_model
from tests.runs import settings
from train import start
from training.divergence import ReplicaMismatchError, check_replicas
from training.optimizer import apply_update, build_optimizer, training_tensors
from training.run_folder import RunFolder

TP = (Layout(tp=2), Layout(tp=4), Layout(tp=2, sp=False), Layout(tp=2, dp=2))


def flip_a_bit(tensor: torch.Tensor) -> None:
    """The smallest change there is: the lowest bit of the first element."""
    tensor.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def update(model: GPT, mesh: Mesh) -> dict[str, torch.Tensor]:
    """One training step; returns weights and moments."""
    optimizer = build_optimizer(model, OptimizerConfig())
    model(*batch(), STREAM).objective.backward()
    sum_partial_gradients(model, mesh)
    clip_gradients(model, 1.0, mesh)
    apply_update(optimizer, 1e-3)
    return training_tensors(model, optimizer)


@distributed(*EVERY_LAYOUT)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_right_step_leaves_copies_alike(mesh: Mesh, options: str) -> None:
    """Every kind of replica, of weights and moments, on every layout."""
    model = tiny_model(mesh, dataclasses.replace(TINY, **OPTIONS[options]))
    tensors = update(model, mesh)
    before = {name: tensor.to_local().clone() for name, tensor in tensors.items()}
    assert compare_replicas(model, tensors, mesh) == []
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to_local(), before[name]), name
    model(*batch(), STREAM).objective.backward()  # the model works as before


@distributed(*TP)
@pytest.mark.parametrize(
    "name", ["parameters.blocks.1.mlp_norm.weight", "exp_avg_sq.blocks.0.attention.proj.bias"]
)
def test_one_flipped_bit_is_found(mesh: Mesh, name: str) -> None:
    """In a weight or a moment of the last rank; with two copies nobody can say which is right."""
    model = tiny_model(mesh)
    tensors = update(model, mesh)
    last = mesh.world.size - 1
    if mesh.world.rank == last:
        flip_a_bit(tensors[name].to_local())

    (drift,) = compare_replicas(model, tensors, mesh)

    row = tuple(range(mesh.world.size - mesh.tp.size, mesh.world.size))
    assert (drift.name, drift.axis, drift.ranks) == (name, "tp", row)
    assert drift.odd_ranks == ((last,) if mesh.tp.size > 2 else row)


@distributed(Layout(dp=2), Layout(dp=4), Layout(tp=2, dp=2))
def test_a_wrong_gathered_copy_is_found(mesh: Mesh) -> None:
    """A bit that flips on the way to one dp rank: the copy is named, and left to be made anew."""
    model = tiny_model(mesh)
    tensors = update(model, mesh)
    block = model.blocks[1]
    assert isinstance(block, FSDPModule)
    gather = block.unshard

    def gather_badly() -> None:
        gather()
        if mesh.world.rank == 0:
            flip_a_bit(block.mlp.down.weight.to_local())

    block.unshard = gather_badly

    (drift,) = compare_replicas(model, tensors, mesh)

    assert (drift.name, drift.axis) == ("gathered blocks.1.mlp.down.weight", "dp")
    column = tuple(range(0, mesh.world.size, mesh.tp.size))
    assert drift.ranks == column
    assert drift.odd_ranks == ((0,) if mesh.dp.size > 2 else column)
    block.unshard = gather
    assert compare_replicas(model, tensors, mesh) == []


@distributed(Layout(tp=2), Layout(tp=2, dp=2))
def test_a_forgotten_sum_is_found_after_one_step(mesh: Mesh) -> None:
    """The mistake the audit is for: a norm whose partial gradient nobody sums."""
    model = tiny_model(mesh)
    facts = model.blocks[0].mlp_norm.__dict__["facts"]
    facts["bias"] = dataclasses.replace(facts["bias"], grad_is_partial=False)
    drifts = compare_replicas(model, update(model, mesh), mesh)
    names = {f"{kind}.blocks.0.mlp_norm.bias" for kind in ("parameters", "exp_avg", "exp_avg_sq")}
    assert {drift.name for drift in drifts} == names


@pytest.fixture
def config(corpus: object, tmp_path: object) -> Config:
    """A short run."""
    return parse_config(settings(corpus, tmp_path))  # type: ignore[arg-type]


@distributed(Layout(tp=2))
def test_a_run_whose_copies_part_ends(mesh: Mesh, config: Config) -> None:
    """All ranks leave together; exit.json has code 6, the tensor and the ranks."""
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=2)
    config = dataclasses.replace(config, parallel=parallel)
    with pytest.raises(ReplicaMismatchError) as caught, RunFolder(config, mesh) as folder:  # noqa: PT012
        run, state = start(config, mesh, folder)
        if mesh.tp.rank == 1:
            for block in run.model.blocks:
                flip_a_bit(block.mlp_norm.weight.to_local())
        check_replicas(run, state)
    message = str(caught.value)
    assert "step 0: ranks hold different copies of parameters.blocks.0.mlp_norm.weight" in message
    assert "of rank 0, 1 among tp ranks [0, 1]; parameters.blocks.1.mlp_norm.weight" in message
    if mesh.world.rank == 0:
        report = json.loads((folder.path / "exit.json").read_text())
        assert (report["code"], report["reason"]) == (6, message)
