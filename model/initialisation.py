"""How weights start (Radford et al. 2019, section 2.3)."""

from configs.schema import ModelConfig
from parallel import Normal


def matrix_init(config: ModelConfig) -> Normal:
    """Of embeddings and of the matrices that read the residual stream."""
    return Normal(config.init_method_std)


def residual_init(config: ModelConfig) -> Normal:
    """Of the 2 L projections that add to the residual stream.

    Scaled, each is smaller by sqrt(2 L), so that their sum keeps the scale of one.
    """
    scale = (2 * config.num_layers) ** -0.5 if config.use_scaled_init_method else 1.0
    return Normal(config.init_method_std * scale)
