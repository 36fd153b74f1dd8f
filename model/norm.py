"""Normalisation of each token over its channels."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from configs.schema import ModelConfig
from ops.compile import maybe_compile
from parallel import Constant, Mesh, declare_parameter


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * w + b, over the last dim (Ba et al. 2016).

    Per token, so a sequence shard gives what the whole sequence would.
    """

    weight: DTensor
    bias: DTensor

    def __init__(self, size: int, epsilon: float, mesh: Mesh, grad_is_partial: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            declare_parameter(
                self, name, (size,), mesh, init=Constant(value), grad_is_partial=grad_is_partial
            )

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to_local(), self.bias.to_local()
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * w, over the last dim (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight. On a processor torch has no kernel of its own for it."""

    weight: DTensor

    def __init__(self, size: int, epsilon: float, mesh: Mesh, grad_is_partial: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.rms_norm = maybe_compile(rms_norm, mesh.compiles)
        declare_parameter(
            self, "weight", (size,), mesh, init=Constant(1.0), grad_is_partial=grad_is_partial
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x, self.weight.to_local(), self.epsilon)


_NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}


def make_norm(config: ModelConfig, mesh: Mesh) -> nn.Module:
    """The norm of a token's h channels; `[s/t, b, h]` in and out.

    With sequence parallelism the gradients of its weights are sums over s/t positions: partial.
    """
    norm = _NORMS[config.normalization]
    return norm(config.hidden_size, config.norm_epsilon, mesh, mesh.sequence_parallel)


def make_head_norm(config: ModelConfig, mesh: Mesh) -> nn.Module:
    """The norm of a head's d channels (Henry et al. 2020); `[s, b, a/t, d]` in and out.

    All heads have the same weights and a rank has some of the heads: partial on every layout.
    """
    norm = _NORMS[config.normalization]
    return norm(config.head_dim, config.norm_epsilon, mesh, mesh.tp.size > 1)
