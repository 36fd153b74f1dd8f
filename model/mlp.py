"""The feed-forward half of a block."""

from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import ModelConfig
from model.initialisation import residual_init
from parallel import ColumnParallelLinear, Mesh, Normal, RowParallelLinear


class MLP(nn.Module):
    """y = down(gelu(up(x))); `[s/t, b, h]` in and out."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        h, f = config.hidden_size, config.ffn_size
        self.expand = ColumnParallelLinear(h, {"up": f}, mesh, Normal(config.init_method_std))
        self.down = RowParallelLinear(f, h, mesh, residual_init(config))

    def forward(self, x: Tensor) -> Tensor:
        (x,) = self.expand(x)  # [s, b, f/t]
        return self.down(F.gelu(x, approximate=self.approximate))  # [s/t, b, h]
