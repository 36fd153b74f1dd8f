"""Keys and values of the positions that were read before, so that a token is read once."""

from torch import Tensor

from ops.sdpa import sdpa, sdpa_with_past


class KeyValueCache:
    """For each layer the keys and values of up to `capacity` positions of `batch` rows.

    `[capacity, b, g/t, d]` each, allocated when a layer is first read, so that decoding allocates
    nothing that grows. What was read first may have a single row, which then serves all rows.
    """

    def __init__(self, capacity: int, batch: int) -> None:
        self.capacity, self.batch = capacity, batch
        self.length = 0  # positions that are kept; the tokens read next follow them
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep the keys and values of n new positions; what their queries make of all so far.

        `q`, and the result, `[n, b, a/t, d]`; `k`, `v` `[n, b, g/t, d]`. The layer's positions
        count as kept once all layers have them, and `length` is increased; until then the next
        call writes over them.
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
        """Memory that it has taken, on this rank."""
        tensors = (tensor for pair in self._layers.values() for tensor in pair)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
