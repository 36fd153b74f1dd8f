"""Normalisation of each token over its channels."""

from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import ModelConfig
from configs.weights import Weights
from ops.compile import maybe_compile
from parallel import Mesh, declare_parameter


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * w + b, over the last dim (Ba et al. 2016)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weights: Weights, epsilon: float, mesh: Mesh, grad_is_partial: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name, spec in weights.items():
            declare_parameter(self, name, spec, mesh, grad_is_partial=grad_is_partial)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * w, over the last dim (Zhang and Sennrich 2019)."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight, compiled because torch has no fused kernel for it on a CPU."""

    weight: Tensor

    def __init__(self, weights: Weights, epsilon: float, mesh: Mesh, grad_is_partial: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.rms_norm = maybe_compile(rms_norm, mesh.compile)
        declare_parameter(self, "weight", weights["weight"], mesh, grad_is_partial=grad_is_partial)

    def forward(self, x: Tensor) -> Tensor:
        return self.rms_norm(x, self.weight.to(x.dtype), self.epsilon)


_NORMS = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}


def make_norm(config: ModelConfig, weights: Weights, mesh: Mesh) -> nn.Module:
    """Create a norm over h channels, `[s/t, b, h]`: its gradients are sums over s/t positions."""
    return _NORMS[config.normalization](weights, config.norm_epsilon, mesh, mesh.sequence_parallel)


def make_head_norm(config: ModelConfig, weights: Weights, mesh: Mesh) -> nn.Module:
    """Create a norm over a head's d channels, `[s, b, a/t, d]` (Henry et al. 2020).

    All heads share its weights, so a rank's gradients are partial sums on every layout.
    """
    return _NORMS[config.normalization](weights, config.norm_epsilon, mesh, mesh.tp.size > 1)
