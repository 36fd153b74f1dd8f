"""Options of Hugging Face models as settings of `model`, and back; see interop/huggingface.py.

No option is dropped silently: one without a counterpart is an error that names it.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from configs.errors import UserError, format_value
from configs.schema import ModelConfig
from interop.huggingface import Family

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class _Option:
    """An option of config.json and the setting that it is a function of."""

    setting: str  # of `model`; vocab_size is that of `data`
    kind: type  # of the value in config.json
    default: object = ...  # what transformers assumes if it is missing; ...: it is required
    names: Mapping[Any, Any] | None = None  # from their values to ours, where these differ


_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_NOT = {True: False, False: True}
_OPTIONS: dict[Family, dict[str, _Option]] = {
    "gpt2": {
        "vocab_size": _Option("vocab_size", int, 50257),
        "tie_word_embeddings": _Option("untie_embeddings_and_output_weights", bool, True, _NOT),
        "n_positions": _Option("seq_length", int),
        "n_embd": _Option("hidden_size", int),
        "n_layer": _Option("num_layers", int),
        "n_head": _Option("num_attention_heads", int),
        "n_inner": _Option("ffn_hidden_size", int, None),
        "activation_function": _Option("activation", str, "gelu_new", _GELUS),
        "resid_pdrop": _Option("hidden_dropout", float, 0.1),
        "embd_pdrop": _Option("hidden_dropout", float, 0.1),
        "attn_pdrop": _Option("attention_dropout", float, 0.1),
        "layer_norm_epsilon": _Option("norm_epsilon", float, 1e-5),
    },
    "llama": {
        "vocab_size": _Option("vocab_size", int, 32000),
        "tie_word_embeddings": _Option("untie_embeddings_and_output_weights", bool, False, _NOT),
        "hidden_size": _Option("hidden_size", int),
        "intermediate_size": _Option("ffn_hidden_size", int),
        "num_hidden_layers": _Option("num_layers", int),
        "num_attention_heads": _Option("num_attention_heads", int),
        "num_key_value_heads": _Option("num_query_groups", int, None),
        "head_dim": _Option("head_dim", int, None),
        "hidden_act": _Option("activation", str, "silu", {"silu": "swiglu"}),
        "max_position_embeddings": _Option("seq_length", int),
        "rms_norm_eps": _Option("norm_epsilon", float, 1e-6),
        "attention_bias": _Option("add_bias_linear", bool, False),
        "mlp_bias": _Option("add_bias_linear", bool, False),
        "attention_dropout": _Option("attention_dropout", float, 0.0),
    },
}
# Settings that make a model one of the family; the first value is that of published models.
_SETTINGS: dict[Family, dict[str, tuple[object, ...]]] = {
    "gpt2": {
        "normalization": ("LayerNorm",),
        "activation": ("gelu_tanh", "gelu"),
        "position_embedding_type": ("learned_absolute",),
        "add_bias_linear": (True,),
        "qk_layernorm": (False,),
    },
    "llama": {
        "normalization": ("RMSNorm",),
        "activation": ("swiglu",),
        "position_embedding_type": ("rope",),
        "qk_layernorm": (False,),
    },
}
# Options that change what is computed, and the only supported value. All models of transformers 5
# have the first ones.
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
    "llama": {**_FIXED_IN_ALL, "partial_rotary_factor": 1.0},
}
# Other names that GPT2Config accepts, and prefers.
_ALIASES: dict[Family, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "llama": {},
}
_ROPE_OPTIONS = ("rope_theta", "rope_parameters", "rope_scaling")
_ROPE_DEFAULTS = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
_ROTARY_BASE = 10000.0
# Options that do not change what trained weights compute, beyond rounding. import_hf.py reads the
# token ids; `summary` belongs to classification heads.
_WITHOUT_EFFECT = (
    "architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype",
    "use_cache", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id",
    "problem_type", "task_specific_params", "chunk_size_feed_forward", "initializer_range",
    "pretraining_tp", "reorder_and_upcast_attn", "n_ctx", "bos_token_id", "eos_token_id",
    "pad_token_id", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout",
)  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The family that a model can be exported to; UserError names the settings that prevent it."""
    problems = {
        family: [
            f"model.{key}={format_value(value)} (needs {' or '.join(map(format_value, allowed))})"
            for key, allowed in settings.items()
            if (value := getattr(config, key)) not in allowed
        ]
        for family, settings in reversed(_SETTINGS.items())
    }
    if config.num_groups != config.num_attention_heads:
        problems["gpt2"].append(
            f"model.num_query_groups={config.num_query_groups} (needs null, one group per head)"
        )
    closest = min(problems, key=lambda family: len(problems[family]))
    if problems[closest]:
        raise UserError(
            f"the model cannot be exported: closest is {ARCHITECTURES[closest]}, "
            f"which differs in {', '.join(problems[closest])}"
        )
    return closest


def to_huggingface_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The options of config.json, except those of the tokenizer and the files."""
    family = family_of(config)
    settings = {
        **dataclasses.asdict(config),
        "vocab_size": vocab_size,
        "num_query_groups": config.num_groups,
        "ffn_hidden_size": config.ffn_size,
        "head_dim": config.head_dim,
    }
    options: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    for key, option in _OPTIONS[family].items():
        value = settings[option.setting]
        names = option.names or {value: value}
        options[key] = next(theirs for theirs, ours in names.items() if ours == value)
    options["use_cache"] = True
    if family == "llama":
        # transformers 5 reads the first, 4 the second.
        options["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rotary_base}
        options["rope_theta"] = config.rotary_base
    return options


def from_huggingface_config(theirs: Mapping[str, Any]) -> tuple[Family, int, dict[str, Any]]:
    """The family of a config.json, its vocabulary size, and the settings of `model`.

    Raises UserError naming the option for what is unsupported, invalid or missing.
    """
    family = _family_in(theirs)
    options = {k: o.default for k, o in _OPTIONS[family].items() if o.default is not ...}
    options |= theirs
    for alias, key in _ALIASES[family].items():
        if alias in theirs:
            _require(alias, theirs[alias], options.setdefault(key, theirs[alias]))
    for key, expected in _FIXED[family].items():
        _require(key, options.get(key, expected), expected)
    settings: dict[str, Any] = {}
    for key, option in _OPTIONS[family].items():
        value: Any = options.get(key)
        if value is not None or option.default is not None:
            _require_kind(key, value, option.kind)
        if option.names is not None:
            _require(key, value, value if value in option.names else next(iter(option.names)))
            value = option.names[value]
        _require(key, value, settings.setdefault(option.setting, value))
    vocab_size, hidden_size = settings.pop("vocab_size"), settings["hidden_size"]
    if family == "llama":
        settings["rotary_base"] = _rotary_base(options)
        head_dim = hidden_size // settings["num_attention_heads"]
        _require("head_dim", settings.pop("head_dim") or head_dim, head_dim)
    settings["ffn_hidden_size"] = settings["ffn_hidden_size"] or 4 * hidden_size
    fixed = {key: allowed[0] for key, allowed in _SETTINGS[family].items()}
    return family, vocab_size, fixed | settings


def unknown_options(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config.json that no table above has, and that may change the function."""
    family = _family_in(theirs)
    known = {*_OPTIONS[family], *_ALIASES[family], *_FIXED[family], *_WITHOUT_EFFECT}
    known |= {*_ROPE_OPTIONS} if family == "llama" else set()
    # Configs keep options that their class does not have, switched off.
    return {key: value for key, value in theirs.items() if key not in known and value}


def _family_in(theirs: Mapping[str, Any]) -> Family:
    family, architectures = theirs.get("model_type"), theirs.get("architectures")
    known = " or ".join(f"{name} ({kind})" for name, kind in ARCHITECTURES.items())
    if family not in [*ARCHITECTURES]:
        raise UserError(f"config.json has model_type={format_value(family)}; expected {known}")
    if architectures and architectures != [ARCHITECTURES[family]]:
        raise UserError(
            f"config.json has architectures={json.dumps(architectures)}; expected {known}"
        )
    if theirs.get("quantization_config") is not None:
        raise UserError("config.json has a quantization_config; use the unquantized weights")
    return cast(Family, family)


def _require(key: str, value: object, expected: object) -> None:
    if value != expected:
        raise UserError(
            f"config.json has {key}={json.dumps(value)}, which is not supported; "
            f"expected {json.dumps(expected)}"
        )


def _require_kind(key: str, value: object, kind: type) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expected, is_valid = {
        int: ("a positive integer", is_number and isinstance(value, int) and value >= 1),
        float: ("a number", is_number),
        bool: ("true or false", isinstance(value, bool)),
        str: ("a string", isinstance(value, str)),
    }[kind]
    if not is_valid:
        raise UserError(f"config.json has {key}={json.dumps(value)}; expected {expected}")


def _rotary_base(options: Mapping[str, Any]) -> float:
    """The base of default RoPE, which versions of transformers keep in different places.

    Version 5 reads rope_scaling if it is set, otherwise rope_parameters, and takes rope_theta for
    what they lack; version 4 reads rope_theta. If they differ, the trained base is unknown.
    """
    default = options.get("rope_theta", _ROTARY_BASE)
    bases = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = options.get(name) or {}
        _require(name, rope, rope if isinstance(rope, dict) else {"rope_type": "default"})
        for key, value in rope.items():
            if key != "rope_theta" and _ROPE_DEFAULTS.get(key) != value:
                raise UserError(
                    f"config.json has {name}.{key}={json.dumps(value)}, which is not supported; "
                    "expected default RoPE with only a rope_theta"
                )
        if rope:
            bases[f"{name}.rope_theta"] = rope.get("rope_theta", default)
    if not bases or options.get("rope_theta") is not None:
        bases["rope_theta"] = default
    for key, value in bases.items():
        _require_kind(key, value, float)
    if len(set(bases.values())) > 1:
        stated = ", ".join(f"{key}={json.dumps(value)}" for key, value in bases.items())
        raise UserError(f"config.json has {stated}; keep only the one used in training")
    return float(next(iter(bases.values())))
