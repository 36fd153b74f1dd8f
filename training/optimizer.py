"""AdamW over sharded parameters, and its learning rate."""

import math

import torch
from torch import nn
from torch.optim import AdamW

from configs import Config, OptimizerConfig
from configs.weights import model_weights
from parallel import LocalShard, local_shards

WEIGHTS = "parameters."  # prefix of the names of parameters in a checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019) with weight decay on matrices, not on vectors.

    Its state exists before the first step, so that a checkpoint can be loaded into it.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def weight_tensors(model: nn.Module) -> dict[str, LocalShard]:
    """This rank's part of the weights, by their names in a checkpoint."""
    return {f"{WEIGHTS}{name}": shard for name, shard in local_shards(model).items()}


def training_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, LocalShard]:
    """All tensors of a checkpoint by name: weights and both moments of each."""
    tensors = weight_tensors(model)
    for moment in MOMENTS:
        of_weights = local_shards(model, lambda p: optimizer.state[p][moment])  # noqa: B023
        tensors |= {f"{moment}.{name}": shard for name, shard in of_weights.items()}
    return tensors


def training_names(config: Config) -> list[str]:
    """The names of all tensors of a checkpoint, of which a stage of a pipeline has some."""
    names = model_weights(config.model, config.data.padded_vocab_size)
    kinds = (WEIGHTS, *(f"{moment}." for moment in MOMENTS))
    return [kind + name for kind in kinds for name in names]


def set_num_updates(optimizer: AdamW, num_updates: int) -> None:
    """Set AdamW's number of updates, for its bias correction."""
    for state in optimizer.state.values():
        state["step"].fill_(num_updates)


def reset_optimizer(optimizer: AdamW) -> None:
    """Set its state to that before the first update."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def apply_update(optimizer: AdamW, lr: float) -> None:
    """Update all weights from their gradients, and free those."""
    for group in optimizer.param_groups:
        group["lr"] = lr
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
        f"learning rate reaches {peak:.2e} of optimizer.lr={optimizer.lr:.2e}; use fewer of these "
        "steps, or a longer run"
    )


def _wsd_decay_steps(config: Config) -> int:
    return config.optimizer.lr_wsd_decay_steps or max(1, config.train.train_steps // 10)


def _progress(step: int, start: int, end: int) -> float:
    """The fraction of the way from `start` to `end`."""
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
