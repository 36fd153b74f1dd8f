"""How weights start (Radford et al. 2019, section 2.3)."""

from configs.schema import ModelConfig
from parallel import Normal


def residual_init(config: ModelConfig) -> Normal:
    """Smaller for the projections that add to the residual stream, of which there are 2 L.

    Their sum then keeps the scale of one.
    """
    return Normal(config.init_method_std / (2 * config.num_layers) ** 0.5)
