"""Replica mismatches are found, with tensor and ranks; equal replicas are left unchanged."""

import dataclasses
import json

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from configs import Config, OptimizerConfig, parse_config
from model import GPT
from parallel import LocalShard, Mesh, compare_replicas, local_gradients, sum_partial_gradients
from tests.distributed import EVERY_LAYOUT, Layout, distributed
from tests.model.test_gpt import OPTIONS, STREAM, TINY, batch, clip, tiny_model
from tests.runs import settings
from tests.weights import clone_tensors
from train import start
from training.divergence import ReplicaMismatchError, check_replicas
from training.optimizer import apply_update, build_optimizer, training_tensors
from training.run_folder import RunFolder

TP = (Layout(tp=2), Layout(tp=4), Layout(tp=2, sp=False), Layout(tp=2, dp=2))


def flip_a_bit(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the first element."""
    tensor.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def update(model: GPT, mesh: Mesh) -> dict[str, LocalShard]:
    """One training step; returns weights and moments."""
    optimizer = build_optimizer(model, OptimizerConfig())
    model(*batch(), STREAM).objective.backward()
    sum_partial_gradients(local_gradients(model), mesh)
    clip(model, 1.0, mesh)
    apply_update(optimizer, 1e-3)
    return training_tensors(model, optimizer)


@distributed(*EVERY_LAYOUT)
@pytest.mark.parametrize("options", OPTIONS)
def test_replicas_agree_after_a_step(mesh: Mesh, options: str) -> None:
    """Weights and moments, on every layout; the check changes nothing."""
    model = tiny_model(mesh, dataclasses.replace(TINY, **OPTIONS[options]))
    tensors = update(model, mesh)
    before = clone_tensors(tensors)
    assert compare_replicas(model, tensors, mesh) == []
    for name, tensor in tensors.items():
        assert torch.equal(tensor.tensor, before[name]), name
    model(*batch(), STREAM).objective.backward()  # the model works as before


@distributed(*TP)
@pytest.mark.parametrize(
    "name", ["parameters.blocks.1.mlp_norm.weight", "exp_avg_sq.blocks.0.attention.proj.bias"]
)
def test_one_flipped_bit_is_found(mesh: Mesh, name: str) -> None:
    """A flipped bit in a weight or moment of the last rank is named (of two copies, both)."""
    model = tiny_model(mesh)
    tensors = update(model, mesh)
    last = mesh.world.size - 1
    if mesh.world.rank == last:
        flip_a_bit(tensors[name].tensor)

    (mismatch,) = compare_replicas(model, tensors, mesh)

    row = [*range(mesh.world.size - mesh.tp.size, mesh.world.size)]
    odd = str(last) if mesh.tp.size > 2 else f"{row[0]}, {row[1]}"
    assert mismatch == f"{name} on rank {odd} (of tp ranks {row})"


@distributed(Layout(dp=2), Layout(dp=4), Layout(tp=2, dp=2))
def test_a_wrong_gathered_weight_is_found(mesh: Mesh) -> None:
    """A bit flips on the way to one dp rank: the weight is named and then gathered again."""
    model = tiny_model(mesh)
    tensors = update(model, mesh)
    block = model.blocks[1]
    assert isinstance(block, FSDPModule)
    gather = block.unshard

    def gather_badly() -> None:
        gather()
        if mesh.world.rank == 0:
            flip_a_bit(block.mlp.down.weight)

    block.unshard = gather_badly

    (mismatch,) = compare_replicas(model, tensors, mesh)

    column = [*range(0, mesh.world.size, mesh.tp.size)]
    odd = "0" if mesh.dp.size > 2 else f"{column[0]}, {column[1]}"
    assert mismatch == f"gathered blocks.1.mlp.down.weight on rank {odd} (of dp ranks {column})"
    block.unshard = gather
    assert compare_replicas(model, tensors, mesh) == []


@distributed(Layout(dp=2, replicas=2), Layout(dp=4, replicas=2))
def test_a_moment_that_differs_between_hsdp_replicas_is_found(mesh: Mesh) -> None:
    """The last rank and its counterpart hold the same shard of it."""
    model = tiny_model(mesh)
    tensors = update(model, mesh)
    assert compare_replicas(model, tensors, mesh) == []
    last, shards = mesh.world.size - 1, mesh.dp.size // 2
    name = "exp_avg.blocks.1.mlp.down.weight"
    if mesh.world.rank == last:
        flip_a_bit(tensors[name].tensor)
    pair = [last - shards, last]
    (mismatch,) = compare_replicas(model, tensors, mesh)
    assert mismatch == f"{name} on rank {pair[0]}, {last} (of replicate ranks {pair})"


@distributed(Layout(tp=2), Layout(tp=2, dp=2))
def test_an_unsummed_partial_gradient_is_found_after_one_step(mesh: Mesh) -> None:
    """The gradient of a norm is partial but declared complete."""
    model = tiny_model(mesh)
    declared = model.blocks[0].mlp_norm.__dict__["declared"]["bias"]
    declared["bias"] = dataclasses.replace(declared["bias"], grad_is_partial=False)
    mismatches = compare_replicas(model, update(model, mesh), mesh)
    names = {f"{kind}.blocks.0.mlp_norm.bias" for kind in ("parameters", "exp_avg", "exp_avg_sq")}
    assert {mismatch.partition(" ")[0] for mismatch in mismatches} == names


@pytest.fixture
def config(corpus: object, tmp_path: object) -> Config:
    """A short run."""
    return parse_config(settings(corpus, tmp_path))  # type: ignore[arg-type]


@distributed(Layout(tp=2))
def test_a_replica_mismatch_ends_the_run(mesh: Mesh, config: Config) -> None:
    """On all ranks; exit.json has code 6, the tensors and the ranks."""
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=2)
    config = dataclasses.replace(config, parallel=parallel)
    with pytest.raises(ReplicaMismatchError) as caught, RunFolder(config, mesh) as folder:  # noqa: PT012
        run, state = start(config, mesh, folder)
        if mesh.tp.rank == 1:
            for block in run.model.blocks:
                flip_a_bit(block.mlp_norm.weight)
        check_replicas(run, state)
    message = str(caught.value)
    assert "step 0: ranks hold different copies of parameters.blocks.0.mlp_norm.weight" in message
    assert "on rank 0, 1 (of tp ranks [0, 1]); parameters.blocks.1.mlp_norm.weight" in message
    if mesh.world.rank == 0:
        report = json.loads((folder.path / "exit.json").read_text())
        assert (report["code"], report["reason"]) == (6, message)
