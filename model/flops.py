"""Sizes worked out from the shape of a model alone: parameters, and operations per token."""

from configs.schema import ModelConfig


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Weights of the whole model, biases and norms included."""
    h, f = config.hidden_size, config.ffn_size
    kv = 2 * config.num_groups * config.head_dim
    num_expanding = _num_expanding(config)
    biases = h + kv + h + num_expanding * f + h if config.add_bias_linear else 0
    per_norm = 2 if config.normalization == "LayerNorm" else 1  # weights of a channel
    head_norms = 2 * per_norm * config.head_dim if config.qk_layernorm else 0
    layer = _layer_matrices(config) + biases + 2 * per_norm * h + head_norms
    positions = config.seq_length * h if config.position_embedding_type == "learned_absolute" else 0
    head = vocab_size * h if config.untie_embeddings_and_output_weights else 0
    return vocab_size * h + positions + config.num_layers * layer + per_norm * h + head


def flops_per_token(config: ModelConfig, vocab_size: int, row_length: float | None = None) -> float:
    """Floating-point operations of forward and backward for one position of a row.

    6 per matrix weight (2 in forward, 4 in backward; Kaplan et al. 2020, section 2.1), the head
    included and the embedding, a lookup, not; and 12 L h s for the two products of attention
    (Chowdhery et al. 2022, appendix B), not halved for the causal mask. Recomputation is not
    counted: it is no progress. s is `row_length`, or that of a full row.
    """
    h = config.hidden_size
    matrix_weights = config.num_layers * _layer_matrices(config) + vocab_size * h
    length = config.seq_length if row_length is None else row_length
    return 6 * matrix_weights + 12 * config.num_layers * h * length


def _layer_matrices(config: ModelConfig) -> int:
    """Weights of the matrices of one layer: q, kv, proj; up (and gate), down."""
    h, f = config.hidden_size, config.ffn_size
    kv = 2 * config.num_groups * config.head_dim
    return h * (h + kv + h) + (_num_expanding(config) + 1) * h * f


def _num_expanding(config: ModelConfig) -> int:
    return 2 if config.activation == "swiglu" else 1
