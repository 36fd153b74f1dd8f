"""`parallel.reshard_after_forward=false` gathers weights once per step, with the same results."""

import dataclasses
from collections import Counter
from typing import cast

import pytest

from bench.ours import build_run
from configs import Config, parse_config
from parallel import Mesh, local_shards
from parallel.transport.traffic import Collective, record_traffic
from planning.dry_run import dry_run
from tests.distributed import Layout, distributed, run_on
from training.run_folder import RunFolder
from training.state import RunState, training_batches
from training.step import train_step

LAYERS, MICRO_BATCHES, STEPS = 3, 4, 2


def config_for(dp: int, **parallel: object) -> Config:
    settings = [
        "config=gpt_debug.yaml",
        f"model.num_layers={LAYERS}",
        "model.hidden_size=32",
        "model.seq_length=24",
        "data.vocab_size=331",
        f"train.global_batch_size={MICRO_BATCHES * dp}",
        "train.micro_batch_size=1",
        *(f"parallel.{key}={str(value).lower()}" for key, value in parallel.items()),
    ]
    return parse_config(settings, lambda _: dp)


def train(mesh: Mesh, config: Config) -> tuple[list[float], list[Collective]]:
    """Train; return the losses and weights as numbers, and the collectives of the last step."""
    run = build_run(config, mesh, cast(RunFolder, None))
    state = RunState(wandb_id="none")
    numbers = []
    with training_batches(run, state) as batches:
        for _ in range(STEPS):
            with record_traffic() as traffic:
                result = train_step(run, state, batches)
            numbers += [result.loss, result.grad_norm]
            state = state.advance(result, config.train.global_batch_size)
    for shard in local_shards(run.model).values():
        numbers += shard.tensor.flatten().tolist()
    return numbers, traffic


def gathers(traffic: Counter[Collective]) -> int:
    return sum(count for one, count in traffic.items() if one.kind == "all_gather")


@distributed(Layout(dp=2))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("gradient_sync", ["step", "micro_batch"])
def test_results_are_bit_identical(mesh: Mesh, precision: str, gradient_sync: str) -> None:
    """Losses, norms, weights; blocks gather once per step or twice per micro-batch (root: once)."""
    results, counts = [], []
    for reshard in (True, False):
        config = config_for(
            mesh.dp.size, reshard_after_forward=reshard, gradient_sync=gradient_sync
        )
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, precision=precision)
        )
        numbers, traffic = train(mesh, config)
        results.append(numbers)
        counts.append(gathers(Counter(traffic)))
    assert results[0] == results[1]
    assert counts == [MICRO_BATCHES * (2 * LAYERS + 1), LAYERS + 1]


def compare_traffic(mesh: Mesh, config: Config, expected: Counter[Collective]) -> None:
    _, traffic = train(mesh, config)
    if mesh.world.rank == 0:
        assert Counter(traffic) == expected


@pytest.mark.slow
@pytest.mark.parametrize("gradient_sync", ["step", "micro_batch"])
def test_plan_counts_gathers_and_kept_weights(gradient_sync: str) -> None:
    """plan.py counts the collectives of a real step, and the memory of the weights that stay."""
    config = config_for(2, reshard_after_forward=False, gradient_sync=gradient_sync)
    plan = dry_run(config, 2)
    assert gathers(plan.step) == LAYERS + 1
    assert plan.traffic["dp  the first one, forward"].total() == LAYERS + 1
    assert plan.traffic["dp  one micro-batch, forward"].total() == 0
    run_on(Layout(dp=2), compare_traffic, config=config, expected=plan.step)
    all_traced = dry_run(config, 2, MICRO_BATCHES)
    assert (all_traced.step, all_traced.peak) == (plan.step, plan.peak)
    resharding = dry_run(config_for(2, gradient_sync=gradient_sync), 2)
    more = plan.peak["weight copies"] - resharding.peak["weight copies"]
    block_bytes = 2 * 2 * resharding.state["weights"].of_layer // 4  # bf16, of both ranks
    assert more >= (LAYERS - 2) * block_bytes
