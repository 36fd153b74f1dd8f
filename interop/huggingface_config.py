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

ARCHITECTURES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",  # Llama 1 to 3.2, SmolLM2
    "qwen2": "Qwen2ForCausalLM",  # biases of q, k and v; Qwen2 and 2.5
    "qwen3": "Qwen3ForCausalLM",  # QK-norm
    "stablelm": "StableLmForCausalLM",  # LayerNorm, partial rotary positions
}


@dataclass(frozen=True)
class _Option:
    """An option of config.json and the setting that it is a function of."""

    setting: str  # of `model`; vocab_size is that of `data`
    kind: type  # of the value in config.json
    default: object = ...  # what transformers assumes if it is missing; ...: it is required
    names: Mapping[Any, Any] | None = None  # from their values to ours, where these differ


_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_NOT = {True: False, False: True}
_LLAMA_OPTIONS = {
    "vocab_size": _Option("vocab_size", int),
    "tie_word_embeddings": _Option("untie_embeddings_and_output_weights", bool, False, _NOT),
    "hidden_size": _Option("hidden_size", int),
    "intermediate_size": _Option("ffn_hidden_size", int),
    "num_hidden_layers": _Option("num_layers", int),
    "num_attention_heads": _Option("num_attention_heads", int),
    "num_key_value_heads": _Option("num_query_groups", int),
    "head_dim": _Option("kv_channels", int, None),
    "hidden_act": _Option("activation", str, "silu", {"silu": "swiglu"}),
    "max_position_embeddings": _Option("seq_length", int),
    "rms_norm_eps": _Option("norm_epsilon", float, 1e-6),
    "attention_dropout": _Option("attention_dropout", float, 0.0),
}
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
        **_LLAMA_OPTIONS,
        "num_key_value_heads": _Option("num_query_groups", int, None),
        "mlp_bias": _Option("add_bias_linear", bool, False),
        "attention_bias": _Option("add_bias_linear", bool, False),
    },
    "qwen2": _LLAMA_OPTIONS,
    "qwen3": {**_LLAMA_OPTIONS, "head_dim": _Option("kv_channels", int, 128)},
    "stablelm": {
        **{key: o for key, o in _LLAMA_OPTIONS.items() if key not in ("rms_norm_eps", "head_dim")},
        "layer_norm_eps": _Option("norm_epsilon", float, 1e-5),
        "use_qkv_bias": _Option("add_qkv_bias", bool, False),
    },
}
# Settings that make a model one of the family; the first value is that of published models.
_ROTARY: dict[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "activation": ("swiglu",),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "qk_layernorm": (False,),
}
_SETTINGS: dict[Family, dict[str, tuple[object, ...]]] = {
    "gpt2": {
        "normalization": ("LayerNorm",),
        "activation": ("gelu_tanh", "gelu"),
        "position_embedding_type": ("learned_absolute",),
        "add_bias_linear": (True,),
        "qk_layernorm": (False,),
    },
    "llama": {**_ROTARY, "add_qkv_bias": (False,)},
    "qwen2": {**_ROTARY, "add_bias_linear": (False,), "add_qkv_bias": (True,)},
    "qwen3": {
        **_ROTARY,
        "qk_layernorm": (True,),
        "add_bias_linear": (False,),
        "add_qkv_bias": (False,),
    },
    "stablelm": {
        **{key: allowed for key, allowed in _ROTARY.items() if key != "rotary_percent"},
        "normalization": ("LayerNorm",),
        "add_bias_linear": (False,),
    },
}
# Options that change what is computed, and the only supported value. All models of transformers 5
# have the first ones. Qwen ignores sliding_window unless use_sliding_window is set.
_FIXED_IN_ALL: dict[str, object] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "per_layer_config": None,
    "use_sliding_window": False,
    "attention_chunk_size": None,
    "quantization_config": None,
}
_FIXED: dict[Family, dict[str, object]] = {
    "gpt2": {
        **_FIXED_IN_ALL,
        "sliding_window": None,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "llama": {**_FIXED_IN_ALL, "sliding_window": None},
    "qwen2": _FIXED_IN_ALL,
    "qwen3": {**_FIXED_IN_ALL, "attention_bias": False},
    "stablelm": {
        **_FIXED_IN_ALL,
        "sliding_window": None,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "hidden_dropout": 0.0,
    },
}
# Other names that GPT2Config accepts, and prefers.
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Options of RoPE, inside rope_scaling or rope_parameters or not: our settings, and their types.
_LLAMA3 = {
    "factor": ("rope_scaling_factor", float),
    "low_freq_factor": ("rope_low_freq_factor", float),
    "high_freq_factor": ("rope_high_freq_factor", float),
    "original_max_position_embeddings": ("rope_original_max_position", int),
}
_ROPE: dict[str, tuple[str, Any]] = {
    "rope_theta": ("rotary_base", float),
    "partial_rotary_factor": ("rotary_percent", float),
    **_LLAMA3,
}
_ROTARY_BASE, _STABLELM_PERCENT = 10000.0, 0.25  # what transformers assumes
_WITHOUT_HEAD_DIM: tuple[Family, ...] = ("gpt2", "stablelm")
# Options that do not change what trained weights compute, beyond rounding. import_hf.py reads the
# token ids; `summary` belongs to classification heads.
_WITHOUT_EFFECT = (
    "architectures", "model_type", "transformers_version", "_name_or_path", "dtype", "torch_dtype",
    "use_cache", "output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id",
    "problem_type", "task_specific_params", "chunk_size_feed_forward", "initializer_range",
    "pretraining_tp", "reorder_and_upcast_attn", "n_ctx", "bos_token_id", "eos_token_id",
    "pad_token_id", "max_window_layers", "sliding_window", "is_llama_config",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout",
)  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """The family that a model can be exported to; UserError names the settings that prevent it."""
    if config.add_bias_linear:  # includes those of q, k and v
        config = dataclasses.replace(config, add_qkv_bias=False)
    problems = {
        family: [
            f"model.{key}={format_value(value)} (needs {' or '.join(map(format_value, allowed))})"
            for key, allowed in settings.items()
            if (value := getattr(config, key)) not in allowed
        ]
        for family, settings in _SETTINGS.items()
    }
    heads = config.num_attention_heads
    if config.num_groups != heads:
        problems["gpt2"].append(
            f"model.num_query_groups={config.num_query_groups} (needs null, one group per head)"
        )
    if config.hidden_size % heads:
        problems["llama"].append(
            f"model.hidden_size={config.hidden_size} (needs a multiple of the {heads} heads)"
        )
    if config.attention_size != config.hidden_size:
        for family in _WITHOUT_HEAD_DIM:
            problems[family].append(f"model.kv_channels={config.kv_channels} (needs null)")
    closest = min(problems, key=lambda family: (len(problems[family]), family == "gpt2"))
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
        "kv_channels": config.head_dim,
    }
    options: dict[str, Any] = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    for key, option in _OPTIONS[family].items():
        value = settings[option.setting]
        names = option.names or {value: value}
        options[key] = next(theirs for theirs, ours in names.items() if ours == value)
    options["use_cache"] = True
    if family == "gpt2":
        return options
    # transformers 5 reads rope_scaling, else rope_parameters; 4 reads rope_scaling. Both take from
    # the top level what these lack.
    rope: dict[str, Any] = {"rope_type": config.rope_scaling_type or "default"}
    if config.rope_scaling_type is not None:
        rope |= {theirs: settings[ours] for theirs, (ours, _) in _LLAMA3.items()}
        options["rope_scaling"] = rope
    common = {"rope_theta": config.rotary_base}
    if "rotary_percent" not in _SETTINGS[family]:
        common["partial_rotary_factor"] = config.rotary_percent
    return options | common | {"rope_parameters": rope | common}


def from_huggingface_config(theirs: Mapping[str, Any]) -> tuple[Family, int, dict[str, Any]]:
    """The family of a config.json, its vocabulary size, and the settings of `model`.

    Raises UserError naming the option for what is unsupported, invalid or missing.
    """
    family = _family_in(theirs)
    options = {k: o.default for k, o in _OPTIONS[family].items() if o.default is not ...}
    options |= theirs
    for alias, key in _GPT2_ALIASES.items():
        if family == "gpt2" and alias in theirs:
            _require(alias, theirs[alias], options.setdefault(key, theirs[alias]))
    _require_supported(family, options)
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
    if family != "gpt2":
        settings |= _rope_settings(family, options)
        heads = settings["num_attention_heads"]
        if settings.get("kv_channels", 0) == hidden_size / heads:
            settings["kv_channels"] = None
    settings["ffn_hidden_size"] = settings["ffn_hidden_size"] or 4 * hidden_size
    fixed = {key: allowed[0] for key, allowed in _SETTINGS[family].items()}
    return family, vocab_size, fixed | settings


def _require_supported(family: Family, options: Mapping[str, Any]) -> None:
    for key, expected in _FIXED[family].items():
        _require(key, options.get(key, expected), expected)
    kinds = options.get("layer_types") or []
    same = ["full_attention" for _ in kinds] if isinstance(kinds, list) else ["full_attention"]
    _require("layer_types", kinds, same)


def unknown_options(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config.json that no table above has, and that may change the function."""
    family = _family_in(theirs)
    known = {*_OPTIONS[family], *_FIXED[family], *_WITHOUT_EFFECT, "layer_types"}
    known |= {*_GPT2_ALIASES} if family == "gpt2" else {*_ROPE, "rope_scaling", "rope_parameters"}
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


def _rope_settings(family: Family, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of RoPE, which versions of transformers keep in different places.

    Version 5 reads rope_scaling if it is set, otherwise rope_parameters; version 4 reads
    rope_scaling. Both take from the top level what these lack. If the places differ, the trained
    values are unknown.
    """
    names = [name for name in ("rope_scaling", "rope_parameters") if options.get(name)]
    found = {f"{name}.": _read_rope(family, name, options) for name in names}
    if found:
        found[""] = {key: options[key] for key in _ROPE if options.get(key) is not None}
    else:
        found[""] = _read_rope(family, "", options)
    used = next(iter(found.values()))
    settings: dict[str, Any] = {"rope_scaling_type": None}
    for key, value in used.items():
        stated = {f"{place}{key}": rope[key] for place, rope in found.items() if key in rope}
        if key in _ROPE:
            setting, kind = _ROPE[key]
            for name, other in stated.items():
                _require_kind(name, other, kind)
            settings[setting] = kind(value)
        elif value == "llama3":
            settings["rope_scaling_type"] = value
        if any(other != value for other in stated.values()):
            all_stated = ", ".join(f"{name}={json.dumps(other)}" for name, other in stated.items())
            raise UserError(f"config.json has {all_stated}; keep only the one used in training")
    if "rotary_percent" in _SETTINGS[family]:
        _require("partial_rotary_factor", settings["rotary_percent"], 1.0)
    return settings


def _read_rope(family: Family, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The type and the numbers of RoPE in a place, with defaults; no name: the top level."""
    rope = options.get(name) or {}
    _require(name, rope, rope if isinstance(rope, dict) else {"rope_type": "default"})
    kind = rope.get("rope_type", rope.get("type", "default"))
    percent = options.get("partial_rotary_factor")
    if percent is None:
        percent = _STABLELM_PERCENT if family == "stablelm" else 1.0
    known = {
        "rope_theta": options.get("rope_theta", _ROTARY_BASE),
        "partial_rotary_factor": percent,
    }
    if kind == "llama3":
        known |= dict.fromkeys(_LLAMA3)
        known["original_max_position_embeddings"] = options["max_position_embeddings"]
    types = [(key, kind) for key in ("rope_type", "type") if kind in ("default", "llama3")]
    others = [key for key, value in rope.items() if key not in known and (key, value) not in types]
    if others:
        key = min(others, key=lambda key: "type" not in key)  # the type explains the others
        raise UserError(
            f"config.json has {name}.{key}={json.dumps(rope[key])}, which is not supported; "
            f"expected type default with a rope_theta, or llama3 with {', '.join(_LLAMA3)} too"
        )
    return {"rope_type": kind} | {key: rope.get(key, value) for key, value in known.items()}
