"""What is allowed: the range of every number, and the relations between keys.

Pure functions of the configuration and the number of ranks. How the tensors and the batch divide
over the ranks is in `configs/layout.py`, whether input files exist in `configs/inputs.py`.
"""

import math
from dataclasses import dataclass, fields

from configs.errors import ConfigError, format_value
from configs.fields import KEYS, flatten
from configs.layout import check_layout, divisors
from configs.schema import Config, SourceConfig, WeightedSource

# A trained tokenizer begins with 256 byte pieces, three special ones and the newline.
_SMALLEST_TRAINED_VOCABULARY = 300
# A dropout mask counts (position, channel) in 32 bits.
_LARGEST_ACTIVATION = 2**32
_LARGEST_STEP = 99_999_999  # checkpoint folders have eight digits
_LONGEST_WATCH_S = 1500  # collectives give up by themselves after 1800


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, either end belonging to it or not."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high}"


_COUNT = Range(1)
_COUNT_OR_NONE = Range(0)
_STEPS = Range(0, _LARGEST_STEP)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, open_low=True)
_FRACTION = Range(0, 1, open_high=True)
_WEIGHT = Range(0, 1e9, open_low=True)
RANGES = {
    "run.seed": Range(0, 2**63 - 1),
    "run.stop_at_step": Range(1, _LARGEST_STEP),
    "run.hang_timeout_s": Range(0, _LONGEST_WATCH_S),
    "model.num_layers": _COUNT,
    "model.hidden_size": _COUNT,
    "model.num_attention_heads": _COUNT,
    "model.num_query_groups": _COUNT,
    "model.ffn_hidden_size": _COUNT,
    "model.seq_length": _COUNT,
    "model.hidden_dropout": _FRACTION,
    "model.attention_dropout": _FRACTION,
    "model.norm_epsilon": _POSITIVE,
    "model.rotary_base": Range(1),
    "model.init_method_std": _POSITIVE,
    "parallel.tensor_model_parallel_size": _COUNT,
    "data.vocab_size": Range(1, 2**31),
    "data.validation_fraction": _FRACTION,
    "train.train_steps": _STEPS,
    "train.global_batch_size": _COUNT,
    "train.micro_batch_size": _COUNT,
    "train.z_loss_coeff": _NOT_NEGATIVE,
    "train.max_skipped_in_a_row": _COUNT_OR_NONE,
    "train.max_rollbacks": _COUNT_OR_NONE,
    "train.loss_spike_nats": _POSITIVE,
    "optimizer.lr": _NOT_NEGATIVE,
    "optimizer.min_lr": _NOT_NEGATIVE,
    "optimizer.lr_warmup_steps": _COUNT_OR_NONE,
    "optimizer.lr_wsd_decay_steps": _COUNT,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.adam_beta1": _FRACTION,
    "optimizer.adam_beta2": _FRACTION,
    "optimizer.adam_eps": _POSITIVE,
    "optimizer.clip_grad": _NOT_NEGATIVE,
    "evaluate.interval": _COUNT_OR_NONE,
    "evaluate.max_sequences": _COUNT,
    "evaluate.sample_tokens": _COUNT_OR_NONE,
    "evaluate.sample_temperature": _NOT_NEGATIVE,
    "checkpoint.save_interval": _COUNT_OR_NONE,
    "checkpoint.keep": _COUNT_OR_NONE,
    "checkpoint.max_failed_saves": _COUNT,
    "logging.log_interval": _COUNT,
    "debug.audit_interval": _COUNT_OR_NONE,
}
_MAY_BE_EMPTY = {"evaluate.sample_prompt"}


def validate(config: Config, world_size: int) -> None:
    """Raises ConfigError for the first value or relation that is not allowed on this many ranks."""
    _check_values(config)
    _check_model(config)
    _check_data(config)
    _check_schedule(config)
    _check_profile(config.logging.profile_steps)
    check_layout(config, world_size)


def _check_values(config: Config) -> None:
    for key, value in flatten(config).items():
        if isinstance(value, str) and not value.strip() and key not in _MAY_BE_EMPTY:
            word = "null, or " if KEYS[key].nullable else ""
            raise ConfigError(f"{key} is empty; write {word}{_example(key)}", key)
        if key in RANGES and isinstance(value, int | float) and value not in RANGES[key]:
            raise ConfigError(f"{key}={value} is out of range; it must be {RANGES[key]}", key)


def _example(key: str) -> str:
    default = KEYS[key].default
    return "a text" if default is None else f"for example {default}"


def _check_model(config: Config) -> None:
    h, heads = config.model.hidden_size, config.model.num_attention_heads
    if h % heads:
        lower, upper = h // heads * heads, (h // heads + 1) * heads
        raise ConfigError(
            f"model.hidden_size={h} is not divisible by model.num_attention_heads={heads}; choose "
            f"model.hidden_size={f'{lower} or ' if lower else ''}{upper}, or a divisor of {h} as "
            "model.num_attention_heads",
            "model.hidden_size",
        )
    groups, head_dim = config.model.num_groups, config.model.head_dim
    if heads % groups:
        fitting = ", ".join(map(str, divisors(heads)))
        raise ConfigError(
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}; "
            f"choose one of {fitting}",
            "model.num_query_groups",
        )
    if config.model.position_embedding_type == "rope" and head_dim % 2:
        raise ConfigError(
            "model.position_embedding_type=rope turns channels in pairs, but a head has "
            f"{head_dim} (model.hidden_size={h} / model.num_attention_heads={heads}); choose "
            f"model.hidden_size={h + heads}, or model.position_embedding_type=learned_absolute",
            "model.position_embedding_type",
        )
    if config.model.seq_length * h > _LARGEST_ACTIVATION:
        raise ConfigError(
            f"model.seq_length={config.model.seq_length} x model.hidden_size={h} is more than "
            f"2^32, beyond which dropout masks would repeat; choose model.seq_length="
            f"{_LARGEST_ACTIVATION // h} or less",
            "model.seq_length",
        )


def _check_data(config: Config) -> None:
    data = config.data
    for field in fields(SourceConfig) if data.sources else ():
        key, value = f"data.{field.name}", getattr(data, field.name)
        if value != field.default:
            raise ConfigError(
                f"{key}={format_value(value)} has no meaning beside data.sources, a list of all "
                f"sources; write it into data.sources, or leave {key} out",
                key,
            )
    for prefix, source in data.mixture.items():
        _check_source(prefix, source)
    if data.packing != "stream" and data.sequence_mode != "pack":
        raise ConfigError(
            f"data.packing={data.packing} has no meaning for data.sequence_mode="
            f"{data.sequence_mode}; set data.packing=stream, or data.sequence_mode=pack",
            "data.packing",
        )
    if data.tokenizer is None and data.vocab_size < _SMALLEST_TRAINED_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size={data.vocab_size} is too small to train a tokenizer, which begins "
            "with all 256 bytes and special pieces; choose "
            f"{_SMALLEST_TRAINED_VOCABULARY} or more, or give data.tokenizer",
            "data.vocab_size",
        )


def _check_meaning(prefix: str, source: WeightedSource) -> None:
    """Refuses keys that are for other kinds of sources."""
    meaningless: dict[str, str] = {}  # leaf -> which sources it is for
    if source.source == "python_stdlib":
        kinds = " to what it holds: text, jsonl, parquet, arrow or hub"
        meaningless |= dict.fromkeys(("path", "validation_path"), kinds)
    if source.source != "hub":
        meaningless |= dict.fromkeys(("hub_config", "hub_revision"), "=hub")
    for leaf, kinds in meaningless.items():
        key, value = f"{prefix}.{leaf}", getattr(source, leaf)
        if value is not None:
            raise ConfigError(
                f"{key}={format_value(value)} has no meaning for {prefix}.source={source.source}; "
                f"set {key}=null, or {prefix}.source{kinds}",
                key,
            )


def _check_source(prefix: str, source: WeightedSource) -> None:
    kind, path = f"{prefix}.source={source.source}", f"{prefix}.path"
    _check_meaning(prefix, source)
    if source.source != "python_stdlib" and source.path is None:
        what = "the name of a dataset" if source.source == "hub" else "a file, a folder or a glob"
        raise ConfigError(
            f"{path}=null, but {kind} needs {what}; set {path}, or "
            f"{prefix}.source=python_stdlib for the embedded corpus",
            path,
        )
    for leaf in ("path", "text_field", "hub_split", "validation_path"):
        if getattr(source, leaf) is not None and not getattr(source, leaf).strip():
            raise ConfigError(f"{prefix}.{leaf} is empty; give it, or leave it out", prefix)
    if source.weight not in _WEIGHT:
        raise ConfigError(
            f"{prefix}.weight={source.weight} is out of range; it must be {_WEIGHT}", prefix
        )


def _check_schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.lr_decay_style != "constant" and optimizer.final_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}, but the "
            "learning rate decays from lr to min_lr; choose optimizer.min_lr="
            f"{optimizer.lr / 10:g} (a tenth) or less, or optimizer.lr_decay_style=constant",
            "optimizer.min_lr",
        )
    if optimizer.lr_wsd_decay_steps is not None and optimizer.lr_decay_style != "WSD":
        raise ConfigError(
            f"optimizer.lr_wsd_decay_steps={optimizer.lr_wsd_decay_steps} has no meaning for "
            f"optimizer.lr_decay_style={optimizer.lr_decay_style}; set it to null, or "
            "optimizer.lr_decay_style=WSD",
            "optimizer.lr_wsd_decay_steps",
        )


def _check_profile(steps: tuple[int, int] | None) -> None:
    key = "logging.profile_steps"
    if steps is not None and not 1 <= steps[0] <= steps[1] <= _LARGEST_STEP:
        raise ConfigError(
            f"{key}={format_value(steps)} is no range of steps; write the first and the last one, "
            f"like [10, 12]; steps are counted from 1, and {_LARGEST_STEP} is the largest",
            key,
        )
