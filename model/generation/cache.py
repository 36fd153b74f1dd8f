"""KV cache: keys and values of earlier positions."""

from torch import Tensor

from ops.sdpa import sdpa, sdpa_with_past


class KeyValueCache:
    """Keys and values of up to `capacity` positions of `batch` rows, for each layer.

    `[capacity, b, g/t, d]` each, allocated at a layer's first update. The prefill may have a single
    row, which then serves all rows.
    """

    def __init__(self, capacity: int, batch: int) -> None:
        self.capacity, self.batch = capacity, batch
        self.length = 0  # cached positions; the next tokens follow them
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values of n new positions, and attend to all positions so far.

        `q`, and the result, `[n, b, a/t, d]`; `k`, `v` `[n, b, g/t, d]`. The caller increases
        `length` once all layers are updated; until then the next call overwrites the new positions.
        """
        if layer not in self._layers:
            shape = (self.capacity, self.batch, *k.shape[2:])
            self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        end = self.length + len(k)
        keys, values = self._layers[layer]
        keys[self.length : end], values[self.length : end] = k, v
        if self.length == 0:
            return sdpa(q, k, v, None, 0.0)
        return sdpa_with_past(q, keys[:end], values[:end])

    @property
    def num_bytes(self) -> int:
        """Allocated memory on this rank."""
        return sum(tensor.nbytes for pair in self._layers.values() for tensor in pair)
