"""What was meant by a key that does not exist."""

import difflib
from collections.abc import Iterable

_SIMILARITY = 0.7  # difflib's ratio from which a name counts as a misspelling

# Names that people type, from other trainers and the literature, and the leaf of our key.
ALIASES: dict[str, tuple[str, ...]] = {
    "n_layer": ("num_layers",),
    "num_hidden_layers": ("num_layers",),
    "n_embd": ("hidden_size",),
    "d_model": ("hidden_size",),
    "dim": ("hidden_size",),
    "n_head": ("num_attention_heads",),
    "num_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_query_groups",),
    "num_key_value_heads": ("num_query_groups",),
    "intermediate_size": ("ffn_hidden_size",),
    "block_size": ("seq_length",),
    "seq_len": ("seq_length",),
    "context_length": ("seq_length",),
    "dropout": ("hidden_dropout", "attention_dropout"),
    "rope_theta": ("rotary_base",),
    "tie_word_embeddings": ("untie_embeddings_and_output_weights",),
    "tp": ("tensor_model_parallel_size",),
    "tp_size": ("tensor_model_parallel_size",),
    "dp": ("tensor_model_parallel_size",),  # the other ranks are data parallel
    "gradient_checkpointing": ("recompute_granularity",),
    "batch_size": ("global_batch_size", "micro_batch_size", "num_samples"),
    "gradient_accumulation_steps": ("global_batch_size",),
    "max_iters": ("train_steps",),
    "max_steps": ("train_steps",),
    "dtype": ("precision",),
    "learning_rate": ("lr",),
    "warmup_steps": ("lr_warmup_steps",),
    "warmup_iters": ("lr_warmup_steps",),
    "max_grad_norm": ("clip_grad",),
    "grad_clip": ("clip_grad",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "dataset": ("source", "path"),
    "eval_interval": ("evaluate.interval",),
    "save_steps": ("save_interval",),
    "output_dir": ("run.directory", "output"),
    "temp": ("temperature",),
    "max_length": ("max_new_tokens",),
    "checkpoint": ("run", "step"),
    "model": ("run", "source"),
    "text": ("prompt", "path"),
}


def suggest(name: str, keys: Iterable[str]) -> str | None:
    """The existing keys that a name may mean: its leaf elsewhere, an alias, or a near spelling."""
    keys = list(keys)
    section, _, leaf = name.rpartition(".")
    leaf = leaf.lower().replace("-", "_")
    by_leaf: dict[str, list[str]] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2], []).append(key)
        by_leaf.setdefault(key, []).append(key)
    names = by_leaf | {
        alias: [key for leaf in leaves for key in dict.fromkeys(by_leaf.get(leaf, ()))]
        for alias, leaves in ALIASES.items()
        if alias not in by_leaf
    }
    candidates = [name for name, meant in names.items() if meant]
    near = (
        [leaf] if names.get(leaf) else difflib.get_close_matches(leaf, candidates, 5, _SIMILARITY)
    )
    # Among the misspellings, one of the section that was named is likelier meant.
    in_section = [key for one in near for key in names[one] if key.startswith(f"{section}.")]
    if near:
        return (
            in_section[0] if section and in_section else " or ".join(dict.fromkeys(names[near[0]]))
        )
    close = difflib.get_close_matches(name, keys, 1, 0.8)
    return close[0] if close else None
