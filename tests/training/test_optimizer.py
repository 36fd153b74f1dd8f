"""The learning rate against numbers worked out by hand; AdamW against torch's, dense."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from configs import Config, OptimizerConfig, TrainConfig
from configs.weights import WeightSpec
from parallel import Mesh, declare_parameter, initialise_parameters, local_shards
from tests.distributed import EVERY_LAYOUT, distributed
from tests.weights import fill, full_tensors, gradient_shards
from training.optimizer import (
    apply_update,
    build_optimizer,
    learning_rate,
    schedule_problem,
    training_tensors,
)

BASE = OptimizerConfig(lr=1.0, min_lr=0.1, lr_warmup_steps=4)


def rates(style: str, steps: int = 14, **changes: object) -> list[float]:
    optimizer = dataclasses.replace(BASE, lr_decay_style=style, **changes)  # type: ignore[arg-type]
    config = Config(optimizer=optimizer, train=TrainConfig(train_steps=steps))
    return [learning_rate(step, config) for step in range(steps)]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD"])
def test_warm_up_ends_at_the_peak(style: str) -> None:
    """A quarter, a half, three quarters, all of it; the first update already has a rate."""
    assert rates(style)[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("style", ["linear", "cosine", "WSD"])
def test_the_last_update_has_the_lowest_rate(style: str) -> None:
    """The decay ends with the run."""
    assert rates(style)[-1] == pytest.approx(0.1)


def test_decays_in_between() -> None:
    """Nine updates from the peak at step 4 to the lowest rate at step 13."""
    assert rates("constant")[4:] == [1.0] * 10
    assert rates("linear")[4:] == pytest.approx([1 - 0.1 * n for n in range(10)])
    assert rates("cosine")[7] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 3)))
    assert rates("WSD", lr_wsd_decay_steps=3)[9:] == pytest.approx([1, 1, 0.7, 0.4, 0.1])


def test_warm_up_may_be_longer_than_the_run() -> None:
    """A short trial of a long configuration never leaves the warm-up."""
    assert rates("cosine", steps=2, lr_warmup_steps=10) == pytest.approx([0.1, 0.2])


def problem(style: str, steps: int, **changes: object) -> str:
    optimizer = dataclasses.replace(BASE, lr_decay_style=style, **changes)  # type: ignore[arg-type]
    config = Config(optimizer=optimizer, train=TrainConfig(train_steps=steps))
    return schedule_problem(config) or ""


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD"])
def test_a_schedule_that_fits_is_no_problem(style: str) -> None:
    assert problem(style, 100, lr_warmup_steps=90) == ""
    assert problem(style, 0, lr_warmup_steps=90) == ""


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_a_warm_up_that_is_too_long(style: str) -> None:
    """The message has both keys and the peak rate."""
    found = problem(style, 10, lr_warmup_steps=100)
    assert "optimizer.lr_warmup_steps=100 exceeds train.train_steps=10" in found
    assert "peaks at 1.00e-01, not optimizer.lr=1.00e+00;" in found
    assert max(rates(style, steps=10, lr_warmup_steps=100)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "peak"),
    [
        (20, 8, 13, "1.00e+00"),  # two of thirteen steps into the decay
        (20, 15, None, ""),
        (20, 19, None, "1.00e+00"),
        (20, 0, 40, "5.27e-01"),  # begins in the middle of the decay
        (20, 30, 10, "6.67e-01"),
    ],
)
def test_a_warm_up_and_a_decay_that_are_too_long(
    steps: int, warmup: int, decay: int | None, peak: str
) -> None:
    """The decay of WSD ends with the run, wherever the warm-up is."""
    changes = {"lr_warmup_steps": warmup, "lr_wsd_decay_steps": decay}
    found = problem("WSD", steps, **changes)
    assert bool(found) == bool(peak)
    if found:
        expected = rates("WSD", steps, **changes)
        assert f"peaks at {peak}, not" in found
        assert float(peak) == pytest.approx(max(expected), rel=2e-3)
        assert "optimizer.lr_wsd_decay_steps=" in found


@distributed(*EVERY_LAYOUT)
def test_updates_equal_adamw_on_dense_weights(mesh: Mesh) -> None:
    """Three updates of a matrix (decayed) and a vector (not) from given gradients."""
    module, shapes = nn.Module(), {"matrix": (13, 6), "vector": (9,)}
    for name, shape in shapes.items():
        declare_parameter(module, name, WeightSpec(shape, 0, init_std=1.0), mesh)
    fully_shard(module, mesh=mesh.device_mesh["dp"])
    module.to_empty(device="cpu")
    initialise_parameters(module, 1, mesh)
    config = OptimizerConfig(weight_decay=0.1)
    optimizer = build_optimizer(module, config)
    whole = full_tensors(local_shards(module), mesh)
    dense = {name: nn.Parameter(weight) for name, weight in whole.items()}
    reference = torch.optim.AdamW(
        [
            {"params": [dense["matrix"]], "weight_decay": 0.1},
            {"params": [dense["vector"]], "weight_decay": 0.0},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for weight in dense.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        fill(gradient_shards(module), {name: weight.grad for name, weight in dense.items()})
        apply_update(optimizer, lr=0.01)
        for group in reference.param_groups:
            group["lr"] = 0.01
        reference.step()
    assert all(parameter.grad is None for parameter in module.parameters())
    for name, weight in full_tensors(local_shards(module), mesh).items():
        torch.testing.assert_close(weight, dense[name].data, rtol=1e-5, atol=1e-6)
    assert set(training_tensors(module, optimizer)) == {
        f"{kind}.{name}" for kind in ("parameters", "exp_avg", "exp_avg_sq") for name in shapes
    }


@pytest.mark.parametrize(("given", "end"), [(None, 0.1), (0.0, 0.0), (0.25, 0.25)])
def test_the_last_learning_rate_is_a_tenth_unless_given(given: float | None, end: float) -> None:
    config = Config(
        train=TrainConfig(train_steps=10), optimizer=OptimizerConfig(lr=1.0, min_lr=given)
    )
    assert learning_rate(9, config) == pytest.approx(end)
