"""Options of Hugging Face models as ours, and ours as theirs; see interop/huggingface.py.

Both ways nothing is left out silently: an option of one side that the other has no word for is an
error that names it.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from configs.errors import UserError, format_value
from configs.schema import ModelConfig
from interop.huggingface import Family

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
# What each family is; the first value is that of the published models.
_GPT2: dict[str, tuple[object, ...]] = {
    "normalization": ("LayerNorm",),
    "activation": ("gelu_tanh", "gelu"),
    "position_embedding_type": ("learned_absolute",),
    "add_bias_linear": (True,),
    "qk_layernorm": (False,),
}
_LLAMA: dict[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "activation": ("swiglu",),
    "position_embedding_type": ("rope",),
    "qk_layernorm": (False,),
}
_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Options of theirs that change what is computed, and the only value that ours computes. The first
# ones are of every model of transformers 5.
_FIXED_IN_ALL: dict[str, object] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "sliding_window": None,
    "attention_chunk_size": None,
    "quantization_config": None,
}
_FIXED: dict[Family, dict[str, object]] = {
    "gpt2": {
        **_FIXED_IN_ALL,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {**_FIXED_IN_ALL, "hidden_act": "silu", "partial_rotary_factor": 1.0},
}
# Options that change nothing that trained weights compute, beyond rounding. import_hf.py reads the
# ids; `summary` is that of heads for classification.
_WITHOUT_EFFECT = (
    "architectures",
    "model_type",
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "chunk_size_feed_forward",
    "initializer_range",
    "pretraining_tp",
    "reorder_and_upcast_attn",
    "n_ctx",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)
# Other names that GPT2Config accepts, and then prefers.
_ALIASES: dict[Family, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "llama": {},
}
_SIZES: dict[Family, tuple[str, ...]] = {
    "gpt2": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
    "llama": (
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ),
}
# What transformers takes for a key that config.json leaves out.
_DEFAULTS: dict[Family, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50257,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32000,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    },
}
_ROTARY_BASE = 10000.0
_ROPE_KEYS = ("rope_theta", "rope_parameters", "rope_scaling")
_ROPE_DEFAULTS = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def family_of(config: ModelConfig) -> Family:
    """The family that a model of ours belongs to; UserError names the options that keep it out."""
    problems: dict[Family, list[str]] = {
        "llama": _differences(config, _LLAMA),
        "gpt2": _differences(config, _GPT2),
    }
    if config.num_groups != config.num_attention_heads:
        problems["gpt2"].append(
            f"model.num_query_groups={config.num_query_groups} (needs null, a group for each head)"
        )
    nearest = min(problems, key=lambda family: len(problems[family]))
    if problems[nearest]:
        raise UserError(
            "no Hugging Face model has these options together; the nearest is "
            f"{ARCHITECTURES[nearest]}, but for {', '.join(problems[nearest])}"
        )
    return nearest


def _differences(config: ModelConfig, needed: Mapping[str, tuple[object, ...]]) -> list[str]:
    return [
        f"model.{key}={format_value(value)} (needs {' or '.join(map(format_value, allowed))})"
        for key, allowed in needed.items()
        if (value := getattr(config, key)) not in allowed
    ]


def to_huggingface_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The options of config.json; what the tokenizer and the files say is left to the caller."""
    family = family_of(config)
    shared = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
        "use_cache": True,
    }
    if family == "gpt2":
        names = {ours: theirs for theirs, ours in reversed(_GELUS.items())}
        return shared | {
            "n_positions": config.seq_length,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.ffn_size,
            "activation_function": names[config.activation],
            "resid_pdrop": config.hidden_dropout,
            "embd_pdrop": config.hidden_dropout,
            "attn_pdrop": config.attention_dropout,
            "layer_norm_epsilon": config.norm_epsilon,
        }
    return shared | {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_groups,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.norm_epsilon,
        # transformers 5 reads the first, 4 the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_base},
        "rope_theta": config.rotary_base,
        "attention_bias": config.add_bias_linear,
        "mlp_bias": config.add_bias_linear,
        "attention_dropout": config.attention_dropout,
    }


def from_huggingface_config(theirs: Mapping[str, Any]) -> tuple[Family, int, dict[str, Any]]:
    """The family of a config.json, the rows of its vocabulary, and our options of `model`.

    Raises UserError naming the key for what ours does not compute, and for what is missing.
    """
    family = _family_in(theirs)
    options = _DEFAULTS[family] | dict(theirs)
    for alias, key in _ALIASES[family].items():
        if alias in theirs:
            needed = options.setdefault(key, theirs[alias])
            _require(options, alias, needed, theirs[alias] == needed)
    for key, value in _FIXED[family].items():
        _require(options, key, value, options.get(key, value) == value)
    for key in _SIZES[family]:
        _require_kind(family, key, options.get(key), int)
    for key, default in _DEFAULTS[family].items():
        if default is not None:
            _require_kind(family, key, options[key], type(default))
        elif options[key] is not None:
            _require_kind(family, key, options[key], int)
    ours = _from_gpt2(options) if family == "gpt2" else _from_llama(options)
    untied = not options["tie_word_embeddings"]
    ours |= {"untie_embeddings_and_output_weights": untied}
    return family, options["vocab_size"], ours


def unknown_options(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json sets that is not in the tables above, and may change what is computed."""
    family = _family_in(theirs)
    known = {*_WITHOUT_EFFECT, *_SIZES[family], *_DEFAULTS[family], *_FIXED[family]}
    known |= {*_ALIASES[family], *(_ROPE_KEYS if family == "llama" else ())}
    # Models keep what their class does not have switched off.
    return {key: value for key, value in theirs.items() if key not in known and value}


def _family_in(theirs: Mapping[str, Any]) -> Family:
    family, architectures = theirs.get("model_type"), theirs.get("architectures") or []
    known = " or ".join(f"{name} ({kind})" for name, kind in ARCHITECTURES.items())
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UserError(f"config.json has model_type={format_value(family)}, which is not {known}")
    if architectures and architectures != [ARCHITECTURES[family]]:
        raise UserError(f"config.json has architectures={json.dumps(architectures)}, not {known}")
    if theirs.get("quantization_config") is not None:
        raise UserError("config.json has a quantization_config; give the weights that it came from")
    return cast(Family, family)


def _require(options: Mapping[str, Any], key: str, needed: object, is_met: bool) -> None:
    if not is_met:
        raise UserError(
            f"config.json has {key}={json.dumps(options.get(key))}, which ours does not compute; "
            f"it would have to be {json.dumps(needed)}"
        )


_KINDS = {
    int: "a whole number from 1",
    float: "a number",
    bool: "true or false",
    str: "a name",
}


def _require_kind(family: Family, key: str, value: object, kind: type) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        is_met = is_number
    elif kind is int:
        is_met = is_number and isinstance(value, int) and value >= 1
    else:
        is_met = isinstance(value, kind)
    if not is_met:
        raise UserError(
            f"config.json has {key}={json.dumps(value)}; a {family} model has {_KINDS[kind]} there"
        )


def _from_gpt2(options: Mapping[str, Any]) -> dict[str, Any]:
    activation, dropout = options["activation_function"], options["resid_pdrop"]
    _require(options, "activation_function", "gelu_new", activation in _GELUS)
    _require(options, "embd_pdrop", dropout, options["embd_pdrop"] == dropout)
    return {
        "num_layers": options["n_layer"],
        "hidden_size": options["n_embd"],
        "num_attention_heads": options["n_head"],
        "ffn_hidden_size": options["n_inner"] or 4 * options["n_embd"],
        "seq_length": options["n_positions"],
        "hidden_dropout": dropout,
        "attention_dropout": options["attn_pdrop"],
        "normalization": "LayerNorm",
        "norm_epsilon": options["layer_norm_epsilon"],
        "activation": _GELUS[activation],
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
    }


def _from_llama(options: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden_size = options["num_attention_heads"], options["hidden_size"]
    if options["head_dim"] is not None:
        needed = hidden_size // heads
        _require(options, "head_dim", needed, options["head_dim"] == needed)
    has_bias = options["attention_bias"]
    _require(options, "mlp_bias", has_bias, options["mlp_bias"] == has_bias)
    return {
        "num_layers": options["num_hidden_layers"],
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": options["num_key_value_heads"],
        "ffn_hidden_size": options["intermediate_size"],
        "seq_length": options["max_position_embeddings"],
        "attention_dropout": options["attention_dropout"],
        "normalization": "RMSNorm",
        "norm_epsilon": options["rms_norm_eps"],
        "activation": "swiglu",
        "position_embedding_type": "rope",
        "rotary_base": _rotary_base(options),
        "add_bias_linear": has_bias,
    }


def _rotary_base(options: Mapping[str, Any]) -> float:
    """The base of default RoPE, which versions of transformers keep in different places.

    Version 5 reads rope_scaling if there is one, else rope_parameters, and rope_theta for what they
    leave out; version 4 reads rope_theta. Where they differ, it is unknown what was trained.
    """
    default = options.get("rope_theta", _ROTARY_BASE)
    bases = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = options.get(name) or {}
        _require(options, name, {"rope_type": "default"}, isinstance(rope, dict))
        for key, value in rope.items():
            if key != "rope_theta" and _ROPE_DEFAULTS.get(key) != value:
                raise UserError(
                    f"config.json has {name}.{key}={json.dumps(value)}, which ours does not "
                    "compute; it would have to be default RoPE, with a rope_theta alone"
                )
        if rope:
            bases[f"{name}.rope_theta"] = rope.get("rope_theta", default)
    if not bases or options.get("rope_theta") is not None:
        bases["rope_theta"] = default
    for key, value in bases.items():
        _require_kind("llama", key, value, float)
    if len(set(bases.values())) > 1:
        stated = ", ".join(f"{key}={json.dumps(value)}" for key, value in bases.items())
        raise UserError(f"config.json has {stated}; leave the one that the model was trained with")
    return float(next(iter(bases.values())))
