"""Sizes worked out from the shape of a model alone: parameters, and operations per token."""

from configs.schema import ModelConfig


def num_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Weights of the whole model, biases and norms included."""
    h, f = config.hidden_size, config.ffn_size
    attention = 4 * h * h + 4 * h
    mlp = 2 * h * f + f + h
    norms = 4 * h
    embeddings = vocab_size * h + config.seq_length * h
    head = vocab_size * h if config.untie_embeddings_and_output_weights else 0
    return config.num_layers * (attention + mlp + norms) + embeddings + 2 * h + head


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of forward and backward for one position of a full row.

    6 per matrix weight (2 in forward, 4 in backward; Kaplan et al. 2020, section 2.1), the head
    included and the embedding, a lookup, not; and 12 L h s for the two products of attention
    (Chowdhery et al. 2022, appendix B), not halved for the causal mask. Recomputation is not
    counted: it is no progress.
    """
    h, f = config.hidden_size, config.ffn_size
    matrix_weights = config.num_layers * (4 * h * h + 2 * h * f) + vocab_size * h
    return 6 * matrix_weights + 12 * config.num_layers * h * config.seq_length
