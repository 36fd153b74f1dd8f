"""AdamW and Muon over sharded parameters, and their learning rate.

[Note: Muon]
Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix. Which
weights are such matrices is declared with each weight (`num_matrices` in configs/weights.py): those
of attention and MLP, with q, k, v, up and gate as matrices of their own, however they are stored.
AdamW updates embeddings, head, norms and biases.

    B = mu B + (1 - mu) G      O = orthogonalise(mu B + (1 - mu) G)
    W = (1 - lr weight_decay) W - lr scale O

By default lr is that of AdamW and scale = 0.2 sqrt(max(rows, columns)), which makes an update as
large as a typical one of AdamW (Liu et al. 2025, "Muon is scalable for LLM training", equation 4).
With `optimizer.muon_lr`, that is lr and scale = sqrt(max(1, rows / columns)) as in Jordan et al.
The latter bounds how much a matrix can change its outputs, whatever its width.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from configs import Config, OptimizerConfig
from configs.weights import WeightSpec, model_weights
from ops.newton_schulz import orthogonalise, orthogonalise_flops
from parallel import LocalShard, WholeMatrices, declarations, local_shards

WEIGHTS = "parameters."  # prefix of the names of parameters in a checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter
MUON_MOMENT = "momentum_buffer"


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) with weight decay on matrices, not on vectors.

    With optimizer.name=muon, Muon for some of the matrices, see [Note: Muon]. The state exists
    before the first step, so that a checkpoint can be loaded into it.
    """
    parameters, of_muon = list(model.parameters()), list[nn.Parameter]()
    if config.name == "muon":
        of_muon = [
            parameter
            for _, parameter, declared in declarations(model)
            if any(one.spec.num_matrices for one in declared.values())
        ]
        parameters = [p for p in parameters if not any(p is matrix for matrix in of_muon)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
        "fused": True,
    }
    optimizer = (
        Muon(model, of_muon, groups, config, options) if of_muon else AdamW(groups, **options)
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class Muon(AdamW):
    """Muon for some matrices, AdamW for all other parameters, see [Note: Muon].

    Newton-Schulz iterations run in the model's compute dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        matrices: list[nn.Parameter],
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        options: dict[str, Any],
    ) -> None:
        rate = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
        group = {"params": matrices, "weight_decay": config.weight_decay, "relative_lr": rate}
        super().__init__([*groups, group], **options)
        for matrix in matrices:
            self.state[matrix] = {MUON_MOMENT: torch.zeros_like(matrix)}
        self.model, self.config, self.dtype = model, config, cast(torch.dtype, model.dtype)
        self.whole_matrices = WholeMatrices(
            model, cast(Any, model).mesh, lambda spec: muon_flops(spec, config)
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient. Gradients of matrices become None."""
        *_, group = self.param_groups

        def shards(of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, LocalShard]:
            return local_shards(
                self.model, lambda p: of(p) if MUON_MOMENT in self.state[p] else None
            )

        weights, gradients = shards(lambda p: p), shards(lambda p: p.grad)
        mu, momenta = self.config.muon_momentum, shards(lambda p: self.state[p][MUON_MOMENT])
        for name, gradient in gradients.items():
            momentum = momenta[name].tensor.lerp_(gradient.tensor, 1 - mu)
            gradient.tensor.lerp_(momentum, mu)
        self.whole_matrices.update(gradients, self.dtype, self._orthogonalise)
        for name, weight in weights.items():
            scale = self._scale(weight.spec)
            weight.tensor.mul_(1 - group["lr"] * group["weight_decay"])
            weight.tensor.add_(gradients[name].tensor, alpha=-group["lr"] * scale)
        for matrix in group["params"]:
            matrix.grad = None
        return super().step(closure)

    def _orthogonalise(self, whole: Tensor, spec: WeightSpec) -> Tensor:
        """Orthogonalise each of the matrices in a weight."""
        num_columns = spec.shape[1]
        groups = whole.view(spec.num_row_groups or 1, spec.num_matrices, -1, num_columns)
        result = torch.empty_like(groups)
        for index in range(spec.num_matrices):
            matrix = groups[:, index].reshape(-1, num_columns)
            part = result[:, index]
            part.copy_(orthogonalise(matrix, self.config.muon_num_ns_steps).view(part.shape))
        return result.view(whole.shape)

    def _scale(self, spec: WeightSpec) -> float:
        rows, columns = spec.matrix_shape
        if self.config.muon_lr is None:
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1, rows / columns))


def muon_flops(spec: WeightSpec, config: OptimizerConfig) -> float:
    """Floating-point operations with which Muon orthogonalises a weight in an update."""
    if config.name != "muon" or spec.num_matrices == 0:
        return 0.0
    return spec.num_matrices * orthogonalise_flops(*spec.matrix_shape, config.muon_num_ns_steps)


def weight_tensors(model: nn.Module) -> dict[str, LocalShard]:
    """This rank's part of the weights, by their names in a checkpoint."""
    return {f"{WEIGHTS}{name}": shard for name, shard in local_shards(model).items()}


def training_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, LocalShard]:
    """All tensors of a checkpoint by name: weights and the moments of each."""
    tensors = weight_tensors(model)
    for moment in (*MOMENTS, MUON_MOMENT):
        of_weights = local_shards(model, lambda p: optimizer.state[p].get(moment))  # noqa: B023
        tensors |= {f"{moment}.{name}": shard for name, shard in of_weights.items()}
    return tensors


def training_names(config: Config) -> list[str]:
    """The names of all tensors of a checkpoint, of which a stage of a pipeline has some."""
    weights = model_weights(config.model, config.data.padded_vocab_size)
    of_muon = [
        name
        for name, spec in weights.items()
        if config.optimizer.name == "muon" and spec.num_matrices
    ]
    of_adamw = [name for name in weights if name not in of_muon]
    kinds = {WEIGHTS: weights, f"{MUON_MOMENT}.": of_muon}
    kinds |= {f"{moment}.": of_adamw for moment in MOMENTS}
    return [kind + name for kind, names in kinds.items() for name in names]


def set_num_updates(optimizer: AdamW, num_updates: int) -> None:
    """Set AdamW's number of updates, for its bias correction."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(num_updates)


def reset_optimizer(optimizer: AdamW) -> None:
    """Set its state to that before the first update."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def apply_update(optimizer: AdamW, lr: float) -> None:
    """Update all weights from their gradients, and free those."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("relative_lr", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of the update that follows `step` finished steps.

    A linear warm-up ends at `lr`; then the decay reaches `min_lr` in the last update.
    """
    optimizer, last = config.optimizer, config.train.train_steps - 1
    if step < optimizer.lr_warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.lr_warmup_steps
    match optimizer.lr_decay_style:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - _progress(step, optimizer.lr_warmup_steps, last)
        case "cosine":
            progress = _progress(step, optimizer.lr_warmup_steps, last)
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "WSD":  # warm-up, stable, decay (Hu et al. 2024, section 4)
            remaining = 1.0 - _progress(step, last - _wsd_decay_steps(config), last)
    return optimizer.final_lr + remaining * (optimizer.lr - optimizer.final_lr)


def schedule_problem(config: Config) -> str | None:
    """Why warm-up and decay do not fit in the run, or None."""
    optimizer, steps = config.optimizer, config.train.train_steps
    warmup = optimizer.lr_warmup_steps
    decay = _wsd_decay_steps(config) if optimizer.lr_decay_style == "WSD" else 0
    if not steps or warmup + decay <= steps:
        return None
    # The rate only rises during warm-up, and only falls after it.
    peak = learning_rate(max(0, min(warmup, steps) - 1), config)
    added = f" plus optimizer.lr_wsd_decay_steps={decay}" if decay else ""
    return (
        f"optimizer.lr_warmup_steps={warmup}{added} exceeds train.train_steps={steps}: the "
        f"learning rate peaks at {peak:.2e}, not optimizer.lr={optimizer.lr:.2e}; use fewer of "
        "these steps, or a longer run"
    )


def _wsd_decay_steps(config: Config) -> int:
    return config.optimizer.lr_wsd_decay_steps or max(1, config.train.train_steps // 10)


def _progress(step: int, start: int, end: int) -> float:
    """The fraction of the way from `start` to `end`."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
