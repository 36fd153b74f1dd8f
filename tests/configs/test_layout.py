"""Errors of layouts that do not fit the ranks that torchrun started."""

import pytest

from configs import ConfigError, parse_config

TP, CP = "parallel.tensor_model_parallel_size", "parallel.context_parallel_size"
PP, VPP = "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"

REPLICAS = "parallel.data_parallel_replicate_size"

FEWER = f"choose a larger {TP}, {PP} or {REPLICAS}, fewer ranks or a larger model"

# Number of ranks, arguments after config=gpt_debug, and the error.
LAYOUTS = [
    (
        1,
        f"{TP}=2",
        f"{TP}=2 needs 2 ranks or a multiple of it, not 1 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1",
    ),
    (
        8,
        f"{TP}=3",
        f"{TP}=3 needs 3 ranks or a multiple of it, not 8 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1 or 2 or 4 or 8",
    ),
    (
        8,
        f"{TP}=8 model.num_attention_heads=4",
        f"model.num_attention_heads=4 is not divisible by {TP}=8; choose a divisor of 4 (1, 2, 4)",
    ),
    (
        6,
        f"{TP}=6 model.num_attention_heads=12 model.hidden_size=144 model.num_query_groups=4",
        f"model.num_query_groups=4 neither divides {TP}=6 nor is divisible by it; choose {TP}=1, 2, 4, 12, or another model.num_query_groups",
    ),
    (
        64,
        f"{TP}=1 model.qk_layernorm=true train.global_batch_size=256",
        f"blocks.0.attention.q_norm.weight [32] has too few rows to shard over {TP}=1 x data parallel size 64: a rank would have none; {FEWER}",
    ),
    (
        64,
        f"{TP}=1 model.num_attention_heads=32 model.hidden_size=192 model.num_query_groups=1 model.seq_length=512 train.global_batch_size=256",
        f"blocks.0.attention.qkv.kv.weight [12, 192] has too few rows to shard over {TP}=1 x data parallel size 64: a rank would have none; {FEWER}",
    ),
    (
        6,
        f"{TP}=2 {PP}=2",
        f"{TP}=2 x {PP}=2 needs 4 ranks or a multiple of it, not 6 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1 or 2 or 3 or 6",
    ),
    (
        8,
        f"{PP}=8 model.num_layers=7",
        f"{PP}=8 is more than model.num_layers=7; choose {PP} of at most 7, or more layers",
    ),
    (
        4,
        f"{PP}=4 {VPP}=2 model.num_layers=7",
        f"{PP}=4 x {VPP}=2 is more than model.num_layers=7; choose {PP} x {VPP} of at most 7, or more layers",
    ),
    (
        1,
        f"{VPP}=2",
        f"{VPP}=2 has no effect with {PP}=1; choose {VPP}=null, or {PP}=2 or more",
    ),
    (
        4,
        f"{TP}=4 model.ffn_hidden_size=514",
        f"model.ffn_hidden_size=514 is not divisible by {TP}=4; choose model.ffn_hidden_size=512 or 516",
    ),
    (
        8,
        "model.seq_length=9",
        f"positions [9, 128] has too few rows to shard over {TP}=1 x data parallel size 8: a rank would have none; {FEWER}",
    ),
    (
        8,
        "model.hidden_size=4",
        f"blocks.0.attention_norm.weight [4] has too few rows to shard over {TP}=1 x data parallel size 8: a rank would have none; {FEWER}",
    ),
    (
        8,
        "train.global_batch_size=4",
        "train.global_batch_size=4 is not divisible by train.micro_batch_size=4 x data parallel size 8 = 32; choose train.global_batch_size=32",
    ),
    (
        2,
        "train.global_batch_size=12",
        "train.global_batch_size=12 is not divisible by train.micro_batch_size=4 x data parallel size 2 = 8; choose train.global_batch_size=8 or 16, or train.micro_batch_size=3",
    ),
    (
        4,
        f"{CP}=3 {TP}=2",
        f"{TP}=2 x {CP}=3 needs 6 ranks or a multiple of it, not 4 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1 or 2 or 4",
    ),
    (
        1,
        f"{CP}=2",
        f"{CP}=2 needs 2 ranks or a multiple of it, not 1 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1",
    ),
    (
        4,
        f"{CP}=2 {TP}=2 model.seq_length=7",
        f"model.seq_length=7 is too short for {CP}=2 x {TP}=2, which split each sequence in 8; choose model.seq_length=8 or more, or a smaller {CP}",
    ),
    (
        2,
        f"{CP}=2 model.attention_dropout=0.1",
        f"model.attention_dropout=0.1 is not supported with {CP}=2; choose model.attention_dropout=0, or {CP}=1",
    ),
    (
        8,
        f"{CP}=4 model.hidden_size=4",
        f"blocks.0.attention_norm.weight [4] has too few rows to shard over {TP}=1 x data parallel size 2 x {CP}=4: a rank would have none; {FEWER}",
    ),
    (
        8,
        f"{CP}=4 train.global_batch_size=12",
        "train.global_batch_size=12 is not divisible by train.micro_batch_size=4 x data parallel size 2 = 8; choose train.global_batch_size=8 or 16, or train.micro_batch_size=3",
    ),
    (
        4,
        f"{REPLICAS}=3",
        f"{REPLICAS}=3 needs 3 ranks or a multiple of it, not 4 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1 or 2 or 4",
    ),
    (
        4,
        f"{TP}=2 {CP}=2 {REPLICAS}=2",
        f"{TP}=2 x {CP}=2 x {REPLICAS}=2 needs 8 ranks or a multiple of it, not 4 (torchrun's nodes x --nproc-per-node); start another number of ranks, or choose a product of 1 or 2 or 4",
    ),
    (
        8,
        f"{REPLICAS}=2 {CP}=2 model.hidden_size=2 model.num_attention_heads=1",
        f"blocks.0.attention_norm.weight [2] has too few rows to shard over {TP}=1 x data parallel size 4 / {REPLICAS}=2 x {CP}=2: a rank would have none; {FEWER}",
    ),
]


def _error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(list(arguments))
    return str(caught.value)


@pytest.mark.parametrize(("ranks", "arguments", "message"), LAYOUTS)
def test_error_of_a_layout(
    ranks: int, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment tells the number of ranks before any process group is formed."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    found = _error("config=gpt_debug", *arguments.split(" "))
    assert found.partition(": ")[2] == message if ".yaml:" in found else found == message


@pytest.mark.parametrize("world_size", ["", "0", "two"])
def test_error_of_a_broken_launch(world_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher sets RANK without a usable WORLD_SIZE."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world_size)
    assert "start with torchrun, or unset RANK" in _error("config=gpt_debug")
