"""Every weight of a model: its name, shape, split over tensor-parallel ranks and initial values.

The only such list: `model/` creates its parameters from it; the layout check, the parameter count
and the FLOP count read it. Shapes are global. Symbols: see the legend in `model/gpt.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from configs.schema import ModelConfig


@dataclass(frozen=True)
class WeightSpec:
    """One weight. Initial values are normal with `init_std` around `init_mean`."""

    shape: tuple[int, ...]
    tp_dim: int | None = None  # the dim split over tp ranks; None: replicated
    num_row_groups: int | None = None  # groups of rows that no split may divide (GQA)
    init_std: float = 0.0
    init_mean: float = 0.0
    # Matrices in a block, each of which Muon updates on its own; 0: AdamW updates this weight. Each
    # row group has equal numbers of rows of all of them, one matrix after the other.
    num_matrices: int = 0

    def tp_dim_at(self, tp_size: int) -> int | None:
        """The dim split over `tp_size` ranks; None if there are fewer row groups than ranks."""
        is_shared = self.num_row_groups is not None and self.num_row_groups < tp_size
        return None if is_shared else self.tp_dim

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of each of its `num_matrices`."""
        return self.shape[0] // self.num_matrices, self.shape[1]


Weights = Mapping[str, WeightSpec]


def select(weights: Weights, module: str) -> dict[str, WeightSpec]:
    """The weights of a submodule, by their names inside it."""
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): spec for name, spec in weights.items() if name.startswith(prefix)
    }


def column_weights(
    out_size: int,
    in_size: int,
    init_std: float,
    has_bias: bool = True,
    num_row_groups: int | None = None,
    num_matrices: int = 1,
) -> dict[str, WeightSpec]:
    """A column-parallel linear layer, `[out/t, in]`; so is its bias."""
    shape = (out_size, in_size)
    weight = WeightSpec(shape, 0, num_row_groups, init_std, num_matrices=num_matrices)
    weights = {"weight": weight}
    if has_bias:
        weights["bias"] = WeightSpec((out_size,), 0, num_row_groups)
    return weights


def row_weights(
    out_size: int, in_size: int, init_std: float, has_bias: bool = True
) -> dict[str, WeightSpec]:
    """A row-parallel linear layer, `[out, in/t]`; its bias is replicated."""
    weights = {"weight": WeightSpec((out_size, in_size), 1, init_std=init_std, num_matrices=1)}
    return weights | ({"bias": WeightSpec((out_size,))} if has_bias else {})


def _norm_weights(config: ModelConfig, size: int) -> dict[str, WeightSpec]:
    weights = {"weight": WeightSpec((size,), init_mean=1.0)}
    if config.normalization == "LayerNorm":
        weights["bias"] = WeightSpec((size,))
    return weights


def block_weights(config: ModelConfig) -> dict[str, WeightSpec]:
    """The weights of one transformer block, by their names inside it."""
    h, d, g, f = config.hidden_size, config.head_dim, config.num_groups, config.ffn_size
    q_size, std, has_bias = config.attention_size, config.init_method_std, config.add_bias_linear
    has_qkv_bias = has_bias or config.add_qkv_bias
    # 2 L projections add to the residual stream; scaled, their sum keeps the scale of one (Radford
    # et al. 2019, section 2.3).
    scale = (2 * config.num_layers) ** -0.5 if config.use_scaled_init_method else 1.0
    residual_std = std * scale
    head_norm = _norm_weights(config, d) if config.qk_layernorm else {}
    is_gated = config.activation == "swiglu"
    modules = {
        "attention_norm": _norm_weights(config, h),
        "attention.qkv.q": column_weights(q_size, h, std, has_qkv_bias),
        # Group by group: the d rows of a group's key, then the d rows of its value.
        "attention.qkv.kv": column_weights(2 * g * d, h, std, has_qkv_bias, g, num_matrices=2),
        "attention.q_norm": head_norm,
        "attention.k_norm": head_norm,
        "attention.proj": row_weights(h, q_size, residual_std, has_bias),
        "mlp_norm": _norm_weights(config, h),
        "mlp.expand.up": column_weights(f, h, std, has_bias),
        "mlp.expand.gate": column_weights(f, h, std, has_bias) if is_gated else {},
        "mlp.down": row_weights(h, f, residual_std, has_bias),
    }
    return {
        f"{module}.{name}": spec
        for module, weights in modules.items()
        for name, spec in weights.items()
    }


def model_weights(config: ModelConfig, vocab_size: int) -> dict[str, WeightSpec]:
    """All weights of the model, by the names of its parameters."""
    h, std = config.hidden_size, config.init_method_std
    table = WeightSpec((vocab_size, h), tp_dim=0, init_std=std)
    weights = {"embedding.weight": table}
    if config.position_embedding_type == "learned_absolute":
        weights["positions"] = WeightSpec((config.seq_length, h), init_std=std)
    block = block_weights(config)
    for layer in range(config.num_layers):
        weights |= {f"blocks.{layer}.{name}": spec for name, spec in block.items()}
    weights |= {f"norm.{name}": spec for name, spec in _norm_weights(config, h).items()}
    if config.untie_embeddings_and_output_weights:
        weights["lm_head"] = table
    return weights


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Number of elements of all weights."""
    return sum(math.prod(spec.shape) for spec in model_weights(config, vocab_size).values())


def flops_per_token(config: ModelConfig, vocab_size: int, row_length: float | None = None) -> float:
    """Floating-point operations of forward and backward per position of a row.

    6 for each element of a matrix (2 in forward, 4 in backward; Kaplan et al. 2020, section 2.1),
    the output layer included and the embedding lookup excluded, plus 12 L a d s for the two matmuls
    of attention (Chowdhery et al. 2022, appendix B), not halved for the causal mask. Recomputation
    is not counted. s is `row_length`, or `seq_length` if that is None.
    """
    matrices = [spec.shape for spec in block_weights(config).values() if len(spec.shape) > 1]
    num_elements = config.num_layers * sum(map(math.prod, matrices))
    num_elements += vocab_size * config.hidden_size
    length = config.seq_length if row_length is None else row_length
    return 6 * num_elements + 12 * config.num_layers * config.attention_size * length
