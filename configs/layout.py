"""How model and batch divide over the ranks, and which sizes would work instead.

[Note: no rank without rows]
Every tensor is split by rows over tp (or not), and each tp shard by rows over dp x cp (with HSDP,
over one group of them), in chunks of ceil(rows / parts) with a shorter last one. Uneven chunks
work; empty ones do not, because FSDP2's backward fails on a rank that has no row of a tensor.
"""

import dataclasses

from configs.errors import ConfigError, bad_setting
from configs.schema import Config
from configs.weights import model_weights

_TP = "parallel.tensor_model_parallel_size"
_PP = "parallel.pipeline_model_parallel_size"
_VPP = "parallel.virtual_pipeline_model_parallel_size"
_CP = "parallel.context_parallel_size"
_REPLICAS = "parallel.data_parallel_replicate_size"


def last_chunk(n: int, parts: int) -> int:
    """Return the rows of the last chunk of `n` rows in `parts` chunks of ceil(n / parts) rows."""
    return max(0, n - -(-n // parts) * (parts - 1))


def divisors(n: int) -> list[int]:
    """Return all divisors of `n`, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def stage_layers(num_layers: int, num_pieces: int, piece: int) -> range:
    """Return the layers of one of the pieces of a pipeline; the first ones may have one more."""
    size, rest = divmod(num_layers, num_pieces)
    start = piece * size + min(piece, rest)
    return range(start, start + size + (piece < rest))


def check_layout(config: Config, world_size: int) -> None:
    """Raise ConfigError if the model or the batch cannot be divided over this many ranks."""
    parallel = config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    replicas = parallel.data_parallel_replicate_size
    if world_size % parallel.smallest_world_size:
        axes = {_TP: tp, _CP: cp, _PP: pp, _REPLICAS: replicas}
        sizes = [f"{key}={size}" for key, size in axes.items() if size > 1]
        raise ConfigError(
            f"{' x '.join(sizes)} needs {parallel.smallest_world_size} ranks or a multiple of it, "
            f"not {world_size} (torchrun's nodes x --nproc-per-node); start another number of "
            f"ranks, or choose a product of {listed(divisors(world_size), ' or ')}",
            sizes[0].partition("=")[0],
        )
    if cp > 1:
        _check_context(config, tp, cp)
    _check_stages(config)
    _check_split(config, tp)
    _check_shards(config, tp, world_size // (tp * pp * replicas))
    _check_batch(config, world_size // parallel.ranks_per_replica)


def _check_stages(config: Config) -> None:
    parallel, num_layers = config.parallel, config.model.num_layers
    pp, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    if pp == 1 and (chunks or 1) > 1:
        fix = f"choose {_VPP}=null, or {_PP}=2 or more"
        raise bad_setting(_VPP, chunks, f"has no effect with {_PP}=1; {fix}")
    if pp * (chunks or 1) > num_layers:
        sizes = f"{_PP} x {_VPP}" if chunks else _PP
        x_chunks = f"x {_VPP}={chunks} " if chunks else ""
        problem = f"{x_chunks}is more than model.num_layers={num_layers}"
        fix = f"choose {sizes} of at most {num_layers}, or more layers"
        raise bad_setting(_PP, pp, f"{problem}; {fix}")


def _check_context(config: Config, tp: int, cp: int) -> None:
    model, least = config.model, 2 * cp * tp
    if model.seq_length < least:
        problem = f"is too short for {_CP}={cp} x {_TP}={tp}, which split each sequence in {least}"
        fix = f"choose model.seq_length={least} or more, or a smaller {_CP}"
        raise bad_setting("model.seq_length", model.seq_length, f"{problem}; {fix}")
    if model.attention_dropout > 0:
        fix = f"choose model.attention_dropout=0, or {_CP}=1"
        key, problem = "model.attention_dropout", f"is not supported with {_CP}={cp}"
        raise bad_setting(key, model.attention_dropout, f"{problem}; {fix}")


def _check_split(config: Config, tp: int) -> None:
    model = config.model
    heads, groups, ffn = model.num_attention_heads, model.num_groups, model.ffn_size
    if heads % tp:
        problem = f"model.num_attention_heads={heads} is not divisible by {_TP}={tp}"
        fix = f"choose a divisor of {heads} ({listed(divisors(heads))})"
        raise ConfigError(f"{problem}; {fix}", _TP)
    if not _groups_fit(groups, tp):
        fitting = [divisor for divisor in divisors(heads) if _groups_fit(groups, divisor)]
        problem = f"neither divides {_TP}={tp} nor is divisible by it"
        fix = f"choose {_TP}={listed(fitting)}, or another model.num_query_groups"
        raise bad_setting("model.num_query_groups", groups, f"{problem}; {fix}")
    if ffn % tp:
        fix = f"choose {multiples('model.ffn_hidden_size', ffn, tp)}"
        problem = f"is not divisible by {_TP}={tp}; {fix}"
        raise bad_setting("model.ffn_hidden_size", ffn, problem)


def _groups_fit(groups: int, tp: int) -> bool:
    """Whether each rank has whole groups, or shares one with whole ranks."""
    return groups % tp == 0 or tp % groups == 0


def _check_shards(config: Config, tp: int, dp_cp: int) -> None:
    weight, cp = _weight_with_empty_shard(config, tp, dp_cp), config.parallel.context_parallel_size
    if weight is not None:
        replicas = config.parallel.data_parallel_replicate_size
        others = f"data parallel size {dp_cp * replicas // cp}"
        others += f" / {_REPLICAS}={replicas}" if replicas > 1 else ""
        others += f" x {_CP}={cp}" if cp > 1 else ""
        raise ConfigError(
            f"{weight} has too few rows to shard over {_TP}={tp} x {others}: a rank would have "
            f"none; choose a larger {_TP}, {_PP} or {_REPLICAS}, fewer ranks or a larger model",
            _TP,
        )


def _weight_with_empty_shard(config: Config, tp: int, dp_cp: int) -> str | None:
    """Name and shape of a weight of which some rank would have no row; None if there is none."""
    one_layer = dataclasses.replace(config.model, num_layers=1)  # all layers are alike
    for name, spec in model_weights(one_layer, config.data.padded_vocab_size).items():
        rows, parts = spec.shape[0], tp if spec.tp_dim_at(tp) == 0 else 1
        # The last tp rank may have fewer rows than the others; each shard is split again.
        shards = {-(-rows // parts), last_chunk(rows, parts)}
        if any(last_chunk(shard, dp_cp) == 0 for shard in shards):
            return f"{name} {list(spec.shape)}"
    return None


def _check_batch(config: Config, dp: int) -> None:
    key, batch = "train.global_batch_size", config.train.global_batch_size
    micro = config.train.micro_batch_size
    if batch % (micro * dp) == 0:
        return
    fix = f"choose {multiples(key, batch, micro * dp)}"
    if batch % dp == 0:
        smaller = max(size for size in divisors(batch // dp) if size <= micro)
        fix += f", or train.micro_batch_size={smaller}"
    problem = f"train.micro_batch_size={micro} x data parallel size {dp} = {micro * dp}"
    raise bad_setting(key, batch, f"is not divisible by {problem}; {fix}")


def multiples(key: str, value: int, unit: int) -> str:
    """Return `key=` the multiples of `unit` nearest to a value, as an error offers them."""
    lower = value // unit * unit
    return f"{key}={f'{lower} or ' if lower else ''}{lower + unit}"


def listed(sizes: list[int], separator: str = ", ") -> str:
    """Return sizes with a separator between them."""
    return separator.join(map(str, sizes))
