"""Dropout streams as the loader and the training step create them."""

from collections.abc import Sequence

from ops.dropout import dropout_keys
from parallel import DropoutStream
from tests.distributed import DEVICE


def stream(
    seed: int, step: int, samples: Sequence[int], num_layers: int = 4, device: str = DEVICE
) -> DropoutStream:
    """The masks of a micro-batch, for a model of at most `num_layers` layers."""
    keys = dropout_keys(seed, step, samples, num_layers).to(device)
    return DropoutStream(seed, step, samples[0], keys)
