"""The feed-forward half of a block."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import ModelConfig, Recompute
from configs.weights import Weights, select
from ops.compile import maybe_compile
from ops.recompute import recompute_in_backward
from parallel import MergedColumnParallelLinear, Mesh, RowParallelLinear


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with Phi the CDF of the standard normal (Hendrycks and Gimpel 2016)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation of gelu, with an error of at most 5e-4."""
    return F.gelu(x, approximate="tanh")


def swiglu(x: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) x (Shazeer 2020)."""
    return F.silu(gate) * x


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": swiglu,
}


class MLP(nn.Module):
    """y = down(activation(up(x))), or gated down(activation(up(x), gate(x))).

    `[s/t, b, h]` in and out. up and gate share one gather and one matmul.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, mesh: Mesh, recompute: Recompute
    ) -> None:
        super().__init__()
        self.recompute = recompute
        # torch's own gelu is faster than a compiled one.
        activation, is_gated = _ACTIVATIONS[config.activation], config.activation == "swiglu"
        self.activation = maybe_compile(activation, mesh.compile and is_gated)
        # up, and gate if there is one
        self.expand = MergedColumnParallelLinear(select(weights, "expand"), mesh)  # [f, h] each
        self.down = RowParallelLinear(select(weights, "down"), mesh)  # [h, f]

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.expand(x)  # one or two of [s, b, f/t]
        y = self.activation(*expanded)  # [s, b, f/t]
        kept = [tensor.detach() for tensor in expanded]
        with recompute_in_backward(
            y, lambda: self.activation(*kept), when=self.recompute == "selective"
        ):
            return self.down(y)  # [s/t, b, h]
