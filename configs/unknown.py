"""What was meant by a key that does not exist: the nearest right one across all sections."""

import difflib

from configs.keys import KEYS, SECTIONS

_SIMILARITY = 0.7  # difflib's ratio from which a leaf counts as a misspelling

# What other trainers call our keys; values are shown to a person and begin with the key.
_BATCHES = "train.global_batch_size (sequences a step) or train.micro_batch_size (in one forward)"
_LAYERS = "model.num_layers"
_HIDDEN = "model.hidden_size"
_HEADS = "model.num_attention_heads"
_GROUPS = "model.num_query_groups"
_FFN = "model.ffn_hidden_size"
_NORM = "model.normalization"
_POSITIONS = "model.position_embedding_type"
_ROTARY = "model.rotary_base"
_BIASES = "model.add_bias_linear"
_LENGTH = "model.seq_length"
_DROPOUT = "model.hidden_dropout or model.attention_dropout"
_TENSOR = "parallel.tensor_model_parallel_size"
_RECOMPUTE = "parallel.recompute_granularity"
_STEPS = "train.train_steps"
_ACCUMULATION = (
    "train.global_batch_size (accumulation follows from it: global_batch_size / "
    "(micro_batch_size x data parallel size))"
)
ALIASES = {
    "n_layer": _LAYERS,
    "n_layers": _LAYERS,
    "layers": _LAYERS,
    "num_hidden_layers": _LAYERS,
    "depth": _LAYERS,
    "n_embd": _HIDDEN,
    "d_model": _HIDDEN,
    "dim": _HIDDEN,
    "embed_dim": _HIDDEN,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "num_heads": _HEADS,
    "n_kv_heads": _GROUPS,
    "n_kv_head": _GROUPS,
    "num_kv_heads": _GROUPS,
    "num_key_value_heads": _GROUPS,
    "n_query_groups": _GROUPS,
    "group_query_attention": _GROUPS,
    "d_ff": _FFN,
    "ffn_dim": _FFN,
    "n_inner": _FFN,
    "intermediate_size": _FFN,
    "block_size": _LENGTH,
    "max_seq_len": _LENGTH,
    "seq_len": _LENGTH,
    "sequence_length": _LENGTH,
    "context_length": _LENGTH,
    "n_positions": _LENGTH,
    "n_ctx": _LENGTH,
    "max_position_embeddings": _LENGTH,
    "dropout": _DROPOUT,
    "resid_pdrop": "model.hidden_dropout",
    "embd_pdrop": "model.hidden_dropout",
    "attn_pdrop": "model.attention_dropout",
    "norm_type": _NORM,
    "norm": _NORM,
    "rms_norm_eps": "model.norm_epsilon",
    "layer_norm_epsilon": "model.norm_epsilon",
    "layernorm_epsilon": "model.norm_epsilon",
    "activation_function": "model.activation",
    "hidden_act": "model.activation",
    "swiglu": "model.activation",
    "position_embedding": _POSITIONS,
    "pos_emb": _POSITIONS,
    "rope": _POSITIONS,
    "use_rope": _POSITIONS,
    "rope_theta": _ROTARY,
    "rope_base": _ROTARY,
    "bias": _BIASES,
    "use_bias": _BIASES,
    "disable_bias_linear": f"{_BIASES} (false: no biases)",
    "attention_bias": _BIASES,
    "mlp_bias": _BIASES,
    "qk_norm": "model.qk_layernorm",
    "tie_word_embeddings": "model.untie_embeddings_and_output_weights (true: not tied)",
    "initializer_range": "model.init_method_std",
    "init_std": "model.init_method_std",
    "tp": _TENSOR,
    "tp_size": _TENSOR,
    "tensor_parallel": _TENSOR,
    "tensor_parallel_size": _TENSOR,
    "tensor_parallel_degree": _TENSOR,
    "sp": "parallel.sequence_parallel",
    "dp": f"{_TENSOR} (data parallel size is what remains: ranks / tensor parallel size)",
    "dp_size": f"{_TENSOR} (data parallel size is what remains: ranks / tensor parallel size)",
    "activation_checkpointing": _RECOMPUTE,
    "gradient_checkpointing": _RECOMPUTE,
    "recompute": _RECOMPUTE,
    "overlap": "parallel.tp_comm_overlap",
    "async_tp": "parallel.tp_comm_overlap",
    "torch_compile": "train.compile",
    "batch_size": _BATCHES,
    "micro_batch": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "device_batch_size": "train.micro_batch_size",
    "global_batch": "train.global_batch_size",
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accum_steps": _ACCUMULATION,
    "max_iters": _STEPS,
    "max_steps": _STEPS,
    "steps": _STEPS,
    "train_iters": _STEPS,
    "num_steps": _STEPS,
    "iterations": _STEPS,
    "epochs": f"{_STEPS} (length is in updates, not in epochs)",
    "num_train_epochs": f"{_STEPS} (length is in updates, not in epochs)",
    "z_loss": "train.z_loss_coeff",
    "z_loss_weight": "train.z_loss_coeff",
    "z_loss_coefficient": "train.z_loss_coeff",
    "reset_attention_mask": "data.inter_document_masking",
    "reset_position_ids": "data.inter_document_masking",
    "document_mask": "data.inter_document_masking",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "min_learning_rate": "optimizer.min_lr",
    "warmup": "optimizer.lr_warmup_steps",
    "warmup_iters": "optimizer.lr_warmup_steps",
    "warmup_steps": "optimizer.lr_warmup_steps",
    "lr_warmup_iters": "optimizer.lr_warmup_steps",
    "lr_scheduler": "optimizer.lr_decay_style",
    "lr_schedule": "optimizer.lr_decay_style",
    "decay_style": "optimizer.lr_decay_style",
    "wd": "optimizer.weight_decay",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "betas": "optimizer.adam_beta1 and optimizer.adam_beta2",
    "eps": "optimizer.adam_eps",
    "grad_clip": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "max_norm": "optimizer.clip_grad",
    "gradient_clipping": "optimizer.clip_grad",
    "dataset": "data.source or data.path",
    "data_path": "data.path",
    "tokenizer_model": "data.tokenizer",
    "tokenizer_path": "data.tokenizer",
    "cache_dir": "data.cache_directory",
    "eval_interval": "evaluate.interval",
    "eval_every": "evaluate.interval",
    "eval_steps": "evaluate.interval",
    "eval_iters": "evaluate.max_sequences",
    "temperature": "evaluate.sample_temperature",
    "prompt": "evaluate.sample_prompt",
    "save_steps": "checkpoint.save_interval",
    "save_every": "checkpoint.save_interval",
    "checkpoint_interval": "checkpoint.save_interval",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "logging.log_interval",
    "wandb_mode": "logging.wandb",
    "project": "logging.wandb_project",
    "run_name": "run.name",
    "wandb_run_name": "run.name",
    "out_dir": "run.directory (the run writes to run.directory/run.name)",
    "output_dir": "run.directory (the run writes to run.directory/run.name)",
    "random_seed": "run.seed",
}


def explain_unknown(name: str, text: str) -> str:
    """One line about a value for a key that does not exist: the nearest key, or where to look."""
    section, _, leaf = name.rpartition(".")
    if nearest := _nearest(name, section, leaf.lower().replace("-", "_")):
        return f"{name}={text}: there is no key {name}; did you mean {nearest}?"
    if section in SECTIONS:
        leaves = ", ".join(key.removeprefix(f"{section}.") for key in _keys_of(section))
        return f"{name}={text}: there is no key {name}; the keys of {section} are: {leaves}"
    return (
        f"{name}={text}: there is no key {name}; the sections are: {', '.join(SECTIONS)} "
        "(all keys: python train.py --help)"
    )


def explain_section(section: str, text: str) -> str:
    """One line about a section that was given a value."""
    return (
        f"{section}={text} gives a value to a section; set its keys one by one, such as "
        f"{_keys_of(section)[0]}, or choose a file with config=NAME.yaml"
    )


def _keys_of(section: str) -> list[str]:
    return [name for name in KEYS if name.startswith(f"{section}.")]


def _nearest(name: str, section: str, leaf: str) -> str | None:
    """Keys with this leaf, then other trainers' names, then misspelt leaves, then misspelt keys."""
    leaves: dict[str, list[str]] = {}
    for key in KEYS:
        leaves.setdefault(key.partition(".")[2], []).append(key)
    if leaf in leaves:
        return " or ".join(leaves[leaf])
    if leaf in ALIASES:
        return ALIASES[leaf]
    known = [*leaves, *ALIASES]
    if similar := difflib.get_close_matches(leaf, known, n=5, cutoff=_SIMILARITY):
        # Among the misspellings, one of the section that was named is likelier meant.
        for candidate in similar:
            if f"{section}.{candidate}" in KEYS:
                return f"{section}.{candidate}"
        best = similar[0]
        return " or ".join(leaves[best]) if best in leaves else ALIASES[best]
    # A right section would make every key of it look similar.
    close = [] if section in SECTIONS else difflib.get_close_matches(name, KEYS, 1, _SIMILARITY)
    return close[0] if close else None
