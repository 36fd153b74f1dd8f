"""Muon against dense references: in float32 against float64, in bfloat16 against torch's Muon."""

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from configs import Config, parse_config
from configs.weights import WeightSpec, model_weights
from model import build_model
from ops.newton_schulz import orthogonalise
from parallel import Mesh, WholeMatrices, declare_parameter, local_shards, sum_over
from parallel.transport.traffic import record_traffic
from tests.distributed import EVERY_LAYOUT, ONE_RANK, Layout, distributed
from tests.weights import fill, gradient_shards
from training import optimizer as module
from training.optimizer import apply_update, build_optimizer, training_names, training_tensors

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, LR, WEIGHT_DECAY, MOMENTUM = 3, 0.01, 0.1, 0.95
GROUPS, HEAD_DIM = 2, 6
NUM_MATRICES = 2 * 7  # q, k, v, proj, up, gate and down of two layers
# At tp=4, pairs of ranks share keys and values.
SETTINGS = (
    "config=llama_debug.yaml",
    "model.hidden_size=24",
    "model.num_attention_heads=4",
    f"model.num_query_groups={GROUPS}",
    "model.ffn_hidden_size=36",
    "data.vocab_size=331",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "optimizer.name=muon",
)


def muon_config(mesh: Mesh, *overrides: str) -> Config:
    sizes = (
        f"parallel.tensor_model_parallel_size={mesh.tp.size}",
        f"parallel.context_parallel_size={mesh.cp.size}",
        f"parallel.pipeline_model_parallel_size={mesh.pp.size}",
    )
    return parse_config([*SETTINGS, *sizes, *overrides], lambda _: mesh.world.size)


def random_weights(config: Config, seed: int) -> dict[str, Tensor]:
    """Whole tensors like the weights of the model, by name."""
    generator = torch.Generator().manual_seed(seed)
    weights = model_weights(config.model, config.data.padded_vocab_size)
    return {name: torch.randn(one.shape, generator=generator) for name, one in weights.items()}


def matrices_of(name: str, weight: Tensor) -> Iterator[Tensor]:
    """Views of the matrices in a weight that Muon updates; none of the other weights."""
    if ".kv." in name:
        of_groups = weight.view(GROUPS, 2, HEAD_DIM, -1)
        yield from (of_groups[:, 0], of_groups[:, 1])
    elif name.startswith("blocks.") and weight.ndim == 2:
        yield weight


def set_gradients(model: nn.Module, full: dict[str, Tensor]) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    shards = gradient_shards(model)
    fill(shards, {name: full[name] for name in shards})


def orthogonalise_in_float64(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """Apply the iterations to the singular values."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(num_steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96), (1, 40), (40, 1)])
@pytest.mark.parametrize("num_steps", [1, 5, 8])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_float32_equals_float64(shape: tuple[int, int], num_steps: int, scale: float) -> None:
    """Square, tall and wide matrices of any scale."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    found = orthogonalise(matrix, num_steps)
    assert found.dtype == torch.float32
    expected = orthogonalise_in_float64(matrix, num_steps)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_a_matrix_of_zeros_stays_one() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert orthogonalise(torch.zeros(4, 6, dtype=dtype), 5).count_nonzero() == 0


def float64_reference(full: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> None:
    """Update whole float64 weights in place, those of Muon alone."""
    momenta = {name: torch.zeros_like(weight) for name, weight in full.items()}
    for of_step in gradients:
        for name, weight in full.items():
            gradient = of_step[name].double()
            momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient
            nesterov = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient
            pairs = zip(matrices_of(name, weight), matrices_of(name, nesterov), strict=True)
            for part, direction in pairs:
                rows = direction.reshape(-1, direction.shape[-1])
                scale = 0.2 * math.sqrt(max(rows.shape))
                update = scale * orthogonalise_in_float64(rows).view(part.shape)
                part.mul_(1 - LR * WEIGHT_DECAY).sub_(LR * update)


def trained(
    mesh: Mesh, config: Config, lr: float = LR
) -> tuple[nn.Module, AdamW, dict[str, Tensor], list[dict[str, Tensor]]]:
    """A model and its optimizer after some updates, the first weights, and the gradients."""
    model = build_model(config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    first, shards = random_weights(config, seed=9), local_shards(model)
    fill(shards, {name: first[name] for name in shards})
    gradients = [random_weights(config, step) for step in range(STEPS)]
    for of_step in gradients:
        set_gradients(model, of_step)
        apply_update(optimizer, lr)
    return model, optimizer, first, gradients


@distributed(
    *EVERY_LAYOUT, Layout(pp=2), Layout(cp=2), Layout(tp=2, pp=2), Layout(tp=2, dp=2, replicas=2)
)
def test_updates_equal_a_float64_reference(mesh: Mesh) -> None:
    """Three updates from given gradients; each matrix is orthogonalised once, on one rank."""
    config, num_calls = muon_config(mesh), torch.zeros(1)

    def count(*arguments: Any) -> Tensor:
        num_calls.add_(1)
        return orthogonalise(*arguments)

    with patch.object(module, "orthogonalise", count), record_traffic() as traffic:
        model, optimizer, first, gradients = trained(mesh, config)
    assert sum_over(mesh.world, num_calls).item() == STEPS * NUM_MATRICES
    num_messages = 2 * STEPS if mesh.tp.size * mesh.dp_cp.size > 1 else 0
    assert [one.kind for one in traffic] == ["all_to_all"] * num_messages
    assert all(parameter.grad is None for parameter in model.parameters())
    expected = {name: weight.double() for name, weight in first.items()}
    float64_reference(expected, gradients)
    tensors = training_tensors(model, optimizer)
    for name, shard in local_shards(model).items():
        kinds = [kind for kind, _, rest in (n.partition(".") for n in tensors) if rest == name]
        if [*matrices_of(name, first[name])]:
            whole = expected[name][shard.slices]
            torch.testing.assert_close(shard.tensor.double(), whole, rtol=0, atol=1e-6, msg=name)
            assert kinds == ["parameters", "momentum_buffer"]
        else:
            assert kinds == ["parameters", "exp_avg", "exp_avg_sq"]
    assert tensors.keys() <= {*training_names(config)}
    assert mesh.pp.size > 1 or len(tensors) == len(training_names(config))


def torch_reference(
    full: dict[str, Tensor], gradients: list[dict[str, Tensor]], config: Config, lr: float
) -> None:
    """Update whole weights in place, with torch's Muon and AdamW."""
    options = config.optimizer
    others = {name: weight for name, weight in full.items() if not [*matrices_of(name, weight)]}
    matrices = [
        (view, nn.Parameter(view.reshape(-1, view.shape[-1]).clone()))
        for name, weight in full.items()
        for view in matrices_of(name, weight)
    ]
    muon = torch.optim.Muon(
        [parameter for _, parameter in matrices],
        lr=options.muon_lr or lr,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        adjust_lr_fn="original" if options.muon_lr else "match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [w for w in others.values() if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [w for w in others.values() if w.ndim == 1], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
    )
    for of_step in gradients:
        directions = [m for name, grad in of_step.items() for m in matrices_of(name, grad)]
        for (_, parameter), direction in zip(matrices, directions, strict=True):
            parameter.grad = direction.reshape(parameter.shape)
        for name, weight in others.items():
            weight.grad = of_step[name]
        muon.step()
        adamw.step()
    for view, parameter in matrices:
        view.copy_(parameter.data.view(view.shape))


@pytest.mark.parametrize("muon_lr", [None, 0.02])
@distributed(ONE_RANK, Layout(tp=2))
def test_bfloat16_is_near_torch(mesh: Mesh, muon_lr: float | None) -> None:
    """Updates within 5 % of those of torch.optim.Muon, with both of its scalings.

    torch also rounds the norm, and each product, to bfloat16. AdamW's part is equal.
    """
    overrides = ("train.precision=bf16", f"optimizer.muon_lr={muon_lr or 'null'}")
    config = muon_config(mesh, *overrides, f"optimizer.lr={LR}")
    model, _, first, gradients = trained(mesh, config)
    expected = {name: weight.clone() for name, weight in first.items()}
    torch_reference(expected, gradients, config, LR)
    for name, shard in local_shards(model).items():
        whole = expected[name][shard.slices]
        if [*matrices_of(name, first[name])]:
            update = whole - first[name][shard.slices]
            assert (shard.tensor - whole).norm() < 0.05 * update.norm(), name
        else:
            torch.testing.assert_close(shard.tensor, whole)


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2), Layout(tp=2, dp=2), Layout(dp=4))
def test_more_ranks_than_matrices(mesh: Mesh) -> None:
    """A rank may compute no matrix, and have no row of one."""
    holder, full = nn.Module(), torch.arange(9.0 * 4).view(9, 4)
    spec = WeightSpec((9, 4), 0, num_matrices=1)
    declare_parameter(holder, "matrix", spec, mesh)
    declare_parameter(holder, "vector", WeightSpec((9,)), mesh)
    holder.to_empty(device="cpu")
    if mesh.dp.size > 1:
        fully_shard(holder, mesh=mesh.fsdp_mesh)
    shards = local_shards(holder)
    fill(shards, {"matrix": full, "vector": full[:, 0]})
    matrices = WholeMatrices(holder, mesh, cost=lambda _: 1.0)
    matrices.update(shards, torch.float32, lambda whole, _: whole.flip(0) + whole.sum())
    assert torch.equal(
        shards["matrix"].tensor, (full.flip(0) + full.sum())[shards["matrix"].slices]
    )
    assert torch.equal(shards["vector"].tensor, full[:, 0][shards["vector"].slices])
