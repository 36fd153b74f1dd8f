"""Normalisation of each token over its channels."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from configs.schema import ModelConfig
from parallel import Constant, Mesh, declare_parameter


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + epsilon) * w + b, over the channels of a token; `[s/t, b, h]`.

    Per token, so a sequence shard gives what the whole sequence would. With sequence parallelism
    the gradients of w and b are sums over s/t positions: partial.
    """

    weight: DTensor
    bias: DTensor

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            declare_parameter(
                self,
                name,
                (config.hidden_size,),
                mesh,
                init=Constant(value),
                grad_is_partial=mesh.sequence_parallel,
            )

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to_local(), self.bias.to_local()
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)
