"""Checks of how settings fit together, and whether input files exist. No torch here.

Ranges of single settings are in `configs/schema.py`, the layout over ranks in `configs/layout.py`.
"""

import glob
import os
from collections import Counter
from dataclasses import fields
from pathlib import Path

from configs.errors import ConfigError, bad_setting, format_value
from configs.fields import flatten
from configs.layout import check_layout, divisors, listed, multiples
from configs.schema import COLUMNS, MAX_STEP, Config, DataConfig, ModelConfig, SourceConfig
from configs.tasks import read_tasks
from configs.tokenizer_files import expand_path, find_tokenizer

# A trained tokenizer begins with 256 byte pieces, three special ones and the newline.
_SMALLEST_TRAINED_VOCABULARY = 300
_LARGEST_ACTIVATION = 2**32  # a dropout mask counts (position, channel) in 32 bits
# Settings that have a meaning only for one value of another setting.
_ONLY_WITH = {
    "model.rotary_percent": ("model.position_embedding_type", "rope"),
    "model.rope_scaling_type": ("model.position_embedding_type", "rope"),
    "model.rope_scaling_factor": ("model.rope_scaling_type", "llama3"),
    "model.rope_low_freq_factor": ("model.rope_scaling_type", "llama3"),
    "model.rope_high_freq_factor": ("model.rope_scaling_type", "llama3"),
    "model.rope_original_max_position": ("model.rope_scaling_type", "llama3"),
    "data.packing": ("data.sequence_mode", "pack"),
    "optimizer.lr_wsd_decay_steps": ("optimizer.lr_decay_style", "WSD"),
    "optimizer.muon_lr": ("optimizer.name", "muon"),
    "optimizer.muon_momentum": ("optimizer.name", "muon"),
    "optimizer.muon_num_ns_steps": ("optimizer.name", "muon"),
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # of text and JSON, one file each


def _and_compressed(*extensions: str) -> tuple[str, ...]:
    return (*extensions, *(f"{name}{ending}" for ending in COMPRESSED for name in extensions))


# Extensions to look for in a folder; a file or a glob may have any extension.
SOURCE_EXTENSIONS = {
    "text": _and_compressed(".txt"),
    "jsonl": _and_compressed(".jsonl", ".json"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "megatron": (".idx",),
}


def extensions_in_words(source: str) -> str:
    """Return the extensions of a kind of source as an error names them."""
    plain = [name for name in SOURCE_EXTENSIONS[source] if not name.endswith(COMPRESSED)]
    packed = " (or compressed)" if len(plain) < len(SOURCE_EXTENSIONS[source]) else ""
    return f"{' or '.join(plain)}{packed}"


def index_of(path: str) -> str:
    """Return the .idx file that the prefix or the .bin file of a Megatron dataset means."""
    index = f"{path.removesuffix('.bin')}.idx"
    return index if os.path.isfile(index) and not os.path.isdir(path) else path


def validate(config: Config, world_size: int) -> None:
    """Raise ConfigError if settings do not fit together, or not on this many ranks."""
    _check_model(config)
    _check_data(config)
    _check_schedule(config)
    values, defaults = flatten(config), flatten(Config())
    for key, (other, needed) in _ONLY_WITH.items():
        if values[key] != defaults[key] and values[other] != needed:
            fix = f"set {key}={format_value(defaults[key])}, or {other}={needed}"
            problem = f"has no effect with {other}={format_value(values[other])}; {fix}"
            raise bad_setting(key, values[key], problem)
    steps = config.logging.profile_steps
    if steps is not None and not 1 <= steps[0] <= steps[1] <= MAX_STEP:
        fix = f"write the first and the last step, from 1 to {MAX_STEP}, like [10, 12]"
        raise bad_setting("logging.profile_steps", steps, f"is not a valid step range; {fix}")
    check_layout(config, world_size)


def _check_model(config: Config) -> None:
    model = config.model
    h, heads = model.hidden_size, model.num_attention_heads
    if h % heads and model.kv_channels is None:
        problem = f"is not divisible by model.num_attention_heads={heads}"
        fix = f"choose {multiples('model.hidden_size', h, heads)}, or a divisor of {h} as"
        raise bad_setting("model.hidden_size", h, f"{problem}; {fix} model.num_attention_heads")
    if heads % model.num_groups:
        fix = f"choose one of {listed(divisors(heads))}"
        problem = f"does not divide model.num_attention_heads={heads}; {fix}"
        raise bad_setting("model.num_query_groups", model.num_groups, problem)
    if model.position_embedding_type == "rope":
        _check_rotary(model)
    if model.seq_length * h > _LARGEST_ACTIVATION:
        problem = f"x model.hidden_size={h} is more than 2^32, so dropout masks would repeat"
        fix = f"choose model.seq_length={_LARGEST_ACTIVATION // h} or less"
        raise bad_setting("model.seq_length", model.seq_length, f"{problem}; {fix}")


def _check_rotary(model: ModelConfig) -> None:
    h, heads, low = model.hidden_size, model.num_attention_heads, model.rope_low_freq_factor
    if model.rotary_dim % 2 or model.rotary_dim == 0:
        if model.rotary_percent < 1:
            problem = f"of the {model.head_dim} channels per head is {model.rotary_dim}"
            fix = "choose a fraction that gives an even number, since RoPE rotates pairs"
            raise bad_setting("model.rotary_percent", model.rotary_percent, f"{problem}; {fix}")
        if model.kv_channels is not None:
            fix = f"choose model.kv_channels={model.kv_channels + 1}"
            problem = f"is odd, but RoPE rotates pairs of channels; {fix}"
            raise bad_setting("model.kv_channels", model.kv_channels, problem)
        key = "model.position_embedding_type"
        sizes = f"model.hidden_size={h} / model.num_attention_heads={heads}"
        problem = f"needs an even head dimension, not {model.head_dim} ({sizes})"
        fix = f"choose model.hidden_size={h + heads}, or {key}=learned_absolute"
        raise bad_setting(key, "rope", f"{problem}; {fix}")
    if model.rope_high_freq_factor <= low:
        fix = f"choose more than model.rope_low_freq_factor={low}"
        key, problem = "model.rope_high_freq_factor", f"is too small; {fix}"
        raise bad_setting(key, model.rope_high_freq_factor, problem)


def _check_data(config: Config) -> None:
    data = config.data
    for field in fields(SourceConfig) if data.sources else ():
        key, value = f"data.{field.name}", getattr(data, field.name)
        if value != field.default:
            fix = f"write it into data.sources, or leave {key} out"
            raise bad_setting(key, value, f"has no effect together with data.sources; {fix}")
    for prefix, source in data.mixture.items():
        check_source(f"{prefix}.", source)
        if source.source == "megatron" and data.tokenizer is None:
            fix = "set data.tokenizer to the tokenizer that the files were made with"
            problem = f"data.tokenizer=null, but {prefix}.source=megatron has only tokens"
            raise ConfigError(f"{problem}; {fix}", "data.tokenizer")
    if data.tokenizer is None and data.padded_vocab_size < _SMALLEST_TRAINED_VOCABULARY:
        problem = "is too small to train a tokenizer, which has 256 bytes and special pieces"
        fix = f"choose {_SMALLEST_TRAINED_VOCABULARY} or more, or give data.tokenizer"
        raise bad_setting("data.vocab_size", data.padded_vocab_size, f"{problem}; {fix}")
    if data.has_partial_targets and data.sequence_mode == "pack":
        _check_packing(data)


def _check_packing(data: DataConfig) -> None:
    """Check how documents of which only some tokens are targets are packed into rows."""
    for key, value, needed, problem in (
        ("data.packing", data.packing, "best_fit", "would cut prompts from their targets"),
        (
            "data.inter_document_masking",
            data.inter_document_masking,
            True,
            "would let targets attend to other documents",
        ),
    ):
        if value != needed:
            fix = f"with formats other than text set {key}={format_value(needed)} (or null)"
            raise bad_setting(key, value, f"{problem}; {fix}, or data.sequence_mode=pad")


def check_source(prefix: str, source: SourceConfig) -> None:
    """Raise ConfigError if the settings of a source, `{prefix}source=...`, do not fit together."""
    kind, with_rows = f"{prefix}source={source.source}", "source=jsonl (or parquet, arrow, hub)"
    has_rows = source.source not in ("python_stdlib", "text", "megatron")
    if source.format != "text" and not has_rows:
        fix = f"set {prefix}{with_rows}, or {prefix}format=text"
        problem = f"needs rows with columns, which {kind} does not have; {fix}"
        raise bad_setting(f"{prefix}format", source.format, problem)
    unused = {leaf: f"format={form}" for form, leaves in COLUMNS.items() for leaf in leaves}
    unused = {leaf: needed for leaf, needed in unused.items() if leaf not in source.columns}
    unused |= {} if has_rows else {"text_field": with_rows}
    if source.source != "hub":
        unused |= dict.fromkeys(("hub_config", "hub_split", "hub_revision"), "source=hub")
    if source.source == "python_stdlib":
        with_path = "source=text (or jsonl, parquet, arrow, hub)"
        unused |= dict.fromkeys(("path", "validation_path"), with_path)
    for leaf, needed in unused.items():
        key, value, default = f"{prefix}{leaf}", getattr(source, leaf), getattr(SourceConfig, leaf)
        if value != default:
            other = needed.partition("=")[0]
            problem = f"has no effect with {prefix}{other}={getattr(source, other)}"
            fix = f"set {key}={format_value(default)}, or {prefix}{needed}"
            raise bad_setting(key, value, f"{problem}; {fix}")
    if source.source != "python_stdlib" and source.path is None:
        what = "the name of a dataset" if source.source == "hub" else "a file, a folder or a glob"
        fix = f"set {prefix}path, or {prefix}source=python_stdlib for the embedded corpus"
        raise ConfigError(f"{prefix}path=null, but {kind} needs {what}; {fix}", f"{prefix}path")


def _check_schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.lr_decay_style != "constant" and optimizer.final_lr > optimizer.lr:
        problem = f"is above optimizer.lr={optimizer.lr}, where the decay to min_lr starts"
        fix = f"choose optimizer.min_lr={optimizer.lr / 10:g} (a tenth) or less"
        fix += ", or optimizer.lr_decay_style=constant"
        raise bad_setting("optimizer.min_lr", optimizer.min_lr, f"{problem}; {fix}")
    if optimizer.muon_lr is not None and optimizer.lr == 0:
        problem = "follows the schedule of optimizer.lr=0.0, which is always 0"
        fix = "set optimizer.lr above 0, or optimizer.muon_lr=null"
        raise bad_setting("optimizer.muon_lr", optimizer.muon_lr, f"{problem}; {fix}")


def check_inputs(config: Config) -> None:
    """Raise ConfigError for an input file that is missing, or an output folder that is a file."""
    for prefix, source in config.data.mixture.items():
        for leaf, path in (("path", source.path), ("validation_path", source.validation_path)):
            if path is not None and source.source in SOURCE_EXTENSIONS:
                check_files(f"{prefix}.{leaf}", path, source.source)
    if config.data.tokenizer is not None:
        path = expand_path("data.tokenizer", config.data.tokenizer)
        find_tokenizer(Path(path), "data.tokenizer")
    read_tasks("evaluate.tasks", config.evaluate.tasks)
    for key, folder in (
        ("run.directory", config.run.directory),
        ("data.cache_directory", config.data.cache_directory),
    ):
        path = expand_path(key, folder)
        if os.path.exists(path) and not os.path.isdir(path):
            raise bad_setting(key, folder, "is a file; choose a folder, new or old")


def check_files(key: str, path: str, source: str) -> None:
    """Raise ConfigError if a path of a source has no readable files."""
    expanded, wanted = expand_path(key, path), extensions_in_words(source)
    if source == "megatron":
        expanded = index_of(expanded)
    if os.path.isdir(expanded):
        names = glob.iglob("**", root_dir=expanded, recursive=True)
        found = [os.path.join(expanded, n) for n in names if n.endswith(SOURCE_EXTENSIONS[source])]
        problem = f"is a folder without {wanted} files, which {source} sources consist of"
    elif os.path.exists(expanded):
        found, problem = [expanded], "is neither a file nor a folder"
    else:
        found = glob.glob(expanded, recursive=True)
        problem = "matches no file" if glob.has_magic(expanded) else "does not exist"
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        example = _example_of_glob(key, path, expanded) if source == "text" else ""
        fix = f"give an existing file, a glob{example}, or a folder with {wanted} files"
        raise bad_setting(key, path, f"{problem}; {fix}")
    for file in files:
        if not os.access(file, os.R_OK):
            problem = f"{file} may not be read by this user; change its permissions"
            raise ConfigError(f"{key}={format_value(path)}: {problem}", key)


def _example_of_glob(key: str, path: str, folder: str) -> str:
    """Return a setting for the most common kind of file in a folder, if there is any."""
    names = glob.glob("**/*.*", root_dir=folder, recursive=True)
    files = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    endings = Counter(os.path.splitext(name)[1] for name in files).most_common(1)
    return f" such as {key}='{path}/**/*{endings[0][0]}'" if endings else ""
