"""Errors for users, and suggestions for mistyped keys.

A message names the key, the value, what is allowed and the fix, in one line:
`model.hidden_size=130 is not divisible by model.num_attention_heads=4; choose 128 or 132`.
"""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator

_SHOWN_CHARACTERS = 60
# Errors of the machine rather than the program: storage, permissions, system limits.
_MACHINE_ERRORS = {
    *(errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.EMFILE, errno.ENFILE),
    *(errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE),
}

# Our names, and what nanoGPT, Hugging Face, Megatron-LM and the literature call the same setting.
_ALIASES = {
    "num_layers": "n_layer num_hidden_layers",
    "hidden_size": "n_embd d_model dim",
    "num_attention_heads": "n_head num_heads",
    "num_query_groups": "n_kv_heads num_key_value_heads",
    "kv_channels": "head_dim head_size",
    "ffn_hidden_size": "intermediate_size",
    "seq_length": "block_size context_length max_position_embeddings",
    "hidden_dropout attention_dropout": "dropout",
    "rotary_base": "rope_theta",
    "rotary_percent": "partial_rotary_factor",
    "rope_scaling_type": "rope_scaling",
    "add_qkv_bias": "attention_bias qkv_bias",
    "untie_embeddings_and_output_weights": "tie_word_embeddings",
    "tensor_model_parallel_size": "tp tp_size",
    "pipeline_model_parallel_size": "pp pp_size",
    "context_parallel_size": "cp cp_size",
    "data_parallel_replicate_size": "hsdp dp_replicate",
    "recompute_granularity": "gradient_checkpointing",
    "global_batch_size micro_batch_size num_samples": "batch_size",
    "global_batch_size": "gradient_accumulation_steps",
    "train_steps": "max_iters max_steps train_iters",
    "precision": "dtype",
    "lr": "learning_rate",
    "lr_warmup_steps": "warmup_iters warmup_steps",
    "clip_grad": "grad_clip max_grad_norm",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "source path": "dataset",
    "evaluate.interval": "eval_interval",
    "save_interval": "save_steps",
    "run.directory output": "output_dir out_dir",
    "temperature": "temp",
    "run": "model checkpoint",
    "prompt path": "text",
}
ALIASES = {alias: ours.split() for ours, theirs in _ALIASES.items() for alias in theirs.split()}


class UserError(ValueError):
    """An error that the user can fix: printed as one line, without a traceback, exit code 2.

    Raise it deliberately. Every other exception is a bug and keeps its traceback.
    """


class ConfigError(UserError):
    """A setting that cannot be used; `key` is the setting to change, if there is one."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def bad_setting(key: str, value: object, problem: str) -> ConfigError:
    """Return the error `key=value problem`."""
    return ConfigError(f"{key}={format_value(value)} {problem}", key)


@contextlib.contextmanager
def machine_errors_as_user_errors(task: str) -> Iterator[None]:
    """Raise errors of the machine as UserError `cannot {task}: reason: file`; pass on others."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        file = f": {error.filename}" if error.filename is not None else ""
        raise UserError(f"cannot {task}: {error.strerror}{file}") from error


def os_error_text(error: OSError) -> str:
    """Return the reason for an OSError; those that Python raises itself have no strerror."""
    return error.strerror or str(error) or type(error).__name__


def format_value(value: object) -> str:
    """Format a value as one short line: null and booleans as in YAML, unprintable text escaped."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, tuple | list):
        value = f"[{', '.join(map(format_value, value))}]"
    text = str(value)
    if not text.isprintable() or text != text.strip() or not text:
        text = repr(text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def nearest(word: str, words: Iterable[str]) -> str | None:
    """Return the word most similar to `word`, in any case, or None."""
    by_lower = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), by_lower, 1, 0.8)
    return by_lower[near[0]] if near else None


def suggest(name: str, keys: Iterable[str]) -> str | None:
    """Return the existing key, or keys, that an unknown name probably means.

    Keys of the named section come first.
    """
    keys = list(keys)
    section, _, leaf = name.lower().replace("-", "_").rpartition(".")
    in_section = [key for key in keys if key.startswith(f"{section}.")]
    # `name` is too general to look for in other sections.
    elsewhere = [] if section and leaf == "name" else keys
    longer = [key for key in in_section if leaf and key.endswith(f"_{leaf}")]
    exact = [key for key in elsewhere if key.rpartition(".")[2] == leaf]
    return " or ".join(longer or exact) or _matching(leaf, in_section) or _matching(leaf, elsewhere)


def _matching(leaf: str, keys: list[str]) -> str | None:
    """Return the keys whose last part, or an alias of it, equals or resembles `leaf`."""
    words: dict[str, list[str]] = {}
    for key in keys:
        for word in {key, key.rpartition(".")[2]}:
            words.setdefault(word, []).append(key)
    for alias, ours in ALIASES.items():
        if meant := [key for word in ours for key in words.get(word, ())]:
            words.setdefault(alias, meant)
    near = [leaf] if leaf in words else difflib.get_close_matches(leaf, words, 1, 0.7)
    return " or ".join(words[near[0]]) if near else None
