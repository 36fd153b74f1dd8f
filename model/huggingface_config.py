"""Options of Hugging Face models as ours, and ours as theirs; see model/huggingface.py.

Both ways nothing is left out silently: an option of one side that the other has no word for is an
error that names it.
"""

import json
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError, shown
from configs.schema import ModelConfig
from model.huggingface import Family

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
# Options of theirs that change what is computed, and the only value that ours computes.
_FIXED: dict[Family, dict[str, object]] = {
    "gpt2": {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {"hidden_act": "silu"},
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


def family_of(config: ModelConfig) -> Family:
    """The family that a model of ours belongs to; ValueError names the options that keep it out."""
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
        f"model.{key}={shown(value)} (needs {' or '.join(map(shown, allowed))})"
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
    for key, value in _FIXED[family].items():
        _require(options, key, value, options.get(key, value) == value)
    for key in _SIZES[family]:
        if not isinstance(options.get(key), int) or options[key] < 1:
            raise UserError(
                f"config.json has {key}={json.dumps(options.get(key))}; a {family} model has a "
                "whole number there"
            )
    ours = _from_gpt2(options) if family == "gpt2" else _from_llama(options)
    untied = not options["tie_word_embeddings"]
    ours |= {"untie_embeddings_and_output_weights": untied}
    return family, options["vocab_size"], ours


def _family_in(theirs: Mapping[str, Any]) -> Family:
    family, architectures = theirs.get("model_type"), theirs.get("architectures") or []
    known = " or ".join(f"{name} ({kind})" for name, kind in ARCHITECTURES.items())
    if family not in ARCHITECTURES:
        raise UserError(f"config.json has model_type={shown(family)}, which is not {known}")
    if architectures and architectures != [ARCHITECTURES[family]]:
        raise UserError(f"config.json has architectures={json.dumps(architectures)}, not {known}")
    if "quantization_config" in theirs:
        raise UserError("config.json has a quantization_config; give the weights that it came from")
    return family


def _require(options: Mapping[str, Any], key: str, needed: object, is_met: bool) -> None:
    if not is_met:
        raise UserError(
            f"config.json has {key}={json.dumps(options.get(key))}, which ours does not compute; "
            f"it would have to be {json.dumps(needed)}"
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
    """transformers 5 keeps it in rope_parameters, 4 beside rope_scaling."""
    rope = options.get("rope_parameters") or options.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(
            f"config.json has rope_type={json.dumps(kind)}, which ours does not compute; it would "
            'have to be "default"'
        )
    return float(rope.get("rope_theta", options.get("rope_theta", _ROTARY_BASE)))
