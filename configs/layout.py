"""How the model and the batch divide over the ranks, and which sizes would work instead.

[Note: no rank without rows]
Every tensor is cut by rows over tp (or not), and what a tp rank has is cut by rows over dp, both
times in pieces of ceil(rows / parts) with a shorter last one. Uneven pieces are fine, an empty one
is not: FSDP2's backward fails on a rank that has no row of a tensor.
"""

from configs.errors import ConfigError
from configs.schema import Config
from configs.weights import model_weights


def last_chunk(n: int, parts: int) -> int:
    """Rows in the last piece when `n` rows are cut into `parts` pieces of ceil(n / parts) rows."""
    return max(0, n - -(-n // parts) * (parts - 1))


def divisors(n: int) -> list[int]:
    """All divisors of `n`, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def check_layout(config: Config, world_size: int) -> None:
    """Raises ConfigError if the model or the batch cannot be spread over this many ranks."""
    tp = config.parallel.tensor_model_parallel_size
    _check_ranks(tp, world_size)
    _check_split(config, tp)
    dp = world_size // tp
    _check_shards(config, tp, dp)
    _check_batch(config, dp)


def _check_ranks(tp: int, world_size: int) -> None:
    key = "parallel.tensor_model_parallel_size"
    if tp > world_size:
        ranks = "there is 1 rank" if world_size == 1 else f"there are {world_size} ranks"
        raise ConfigError(
            f"{key}={tp} needs {tp} ranks, or a multiple of it, and {ranks}; start with torchrun "
            f"--nproc-per-node {tp} ..., or choose {key}={world_size}",
            key,
        )
    if world_size % tp:
        raise ConfigError(
            f"{key}={tp} does not divide the number of ranks {world_size} (torchrun's nodes x "
            f"--nproc-per-node); choose a divisor of {world_size} "
            f"({_listed(divisors(world_size))})",
            key,
        )


def _check_split(config: Config, tp: int) -> None:
    size = f"parallel.tensor_model_parallel_size={tp}"
    heads, ffn = config.model.num_attention_heads, config.model.ffn_size
    groups = config.model.num_groups
    if heads % tp:
        raise ConfigError(
            f"model.num_attention_heads={heads} is not divisible by {size}; choose a divisor of "
            f"{heads} ({_listed(divisors(heads))})",
            "parallel.tensor_model_parallel_size",
        )
    if not _groups_fit(groups, tp):
        fitting = [divisor for divisor in divisors(heads) if _groups_fit(groups, divisor)]
        raise ConfigError(
            f"model.num_query_groups={groups} neither divides {size} nor is divisible by it; "
            f"choose parallel.tensor_model_parallel_size={_listed(fitting)}, or another "
            "model.num_query_groups",
            "model.num_query_groups",
        )
    if ffn % tp:
        lower, upper = ffn // tp * tp, (ffn // tp + 1) * tp
        raise ConfigError(
            f"model.ffn_hidden_size={ffn} is not divisible by {size}; choose model.ffn_hidden_size="
            f"{f'{lower} or ' if lower else ''}{upper}",
            "model.ffn_hidden_size",
        )


def _groups_fit(groups: int, tp: int) -> bool:
    """Whether each rank has whole groups, or shares one with whole ranks."""
    return groups % tp == 0 or tp % groups == 0


def _check_shards(config: Config, tp: int, dp: int) -> None:
    weight = _weight_with_empty_shard(config, tp, dp)
    if weight is None:
        return
    key, world_size = "parallel.tensor_model_parallel_size", tp * dp
    working = [size for size in divisors(world_size) if _splits(config, size, world_size)]
    fix = (
        f"with {world_size} ranks, choose {key}={_listed(working)}"
        if working
        else f"no layout of {world_size} ranks works; use fewer ranks or a larger model"
    )
    raise ConfigError(
        f"{weight} has too few rows to shard over {key}={tp} x data parallel size {dp}: a rank "
        f"would have none; {fix}",
        key,
    )


def _splits(config: Config, tp: int, world_size: int) -> bool:
    model = config.model
    divisible = not (model.num_attention_heads % tp or model.ffn_size % tp)
    return (
        divisible
        and _groups_fit(model.num_groups, tp)
        and _weight_with_empty_shard(config, tp, world_size // tp) is None
    )


def _weight_with_empty_shard(config: Config, tp: int, dp: int) -> str | None:
    """Name and shape of a weight of which some rank would have no row; None if there is none."""
    for name, spec in model_weights(config.model, config.data.vocab_size).items():
        rows, parts = spec.shape[0], tp if spec.tp_dim_at(tp) == 0 else 1
        # The last tp rank may have fewer rows than the others; each shard is split again over dp.
        shards = {-(-rows // parts), last_chunk(rows, parts)}
        if any(last_chunk(shard, dp) == 0 for shard in shards):
            return f"{name} {list(spec.shape)}"
    return None


def _check_batch(config: Config, dp: int) -> None:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = micro * dp
    if batch % unit == 0:
        return
    nearest = [size for size in (batch // unit * unit, batch // unit * unit + unit) if size]
    fixes = [f"train.global_batch_size={' or '.join(map(str, nearest))}"]
    if batch % dp == 0:
        smaller = max(size for size in divisors(batch // dp) if size <= micro)
        fixes.append(f"train.micro_batch_size={smaller}")
    raise ConfigError(
        f"train.global_batch_size={batch} is not divisible by train.micro_batch_size={micro} x "
        f"data parallel size {dp} = {unit}; choose {', or '.join(fixes)}",
        "train.global_batch_size",
    )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
