"""Tensor names and layouts of Hugging Face models; transformers is not imported.

Five families compute the same function as a GPT with the right options; see
interop/huggingface_config.py.

GPT-2 stores its matrices as [in, out], and q, k and v as one tensor. The others, whose names are
those of Llama, store k and v as two. Here k and v are one tensor, group by group: the rows of a
group's key, then those of its value.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Size, Tensor

from configs.schema import ModelConfig

Family = Literal["gpt2", "llama", "qwen2", "qwen3", "stablelm"]
Read = Callable[[str], Tensor]  # reads a full tensor by name
Make = Callable[[Read], Tensor]  # makes a tensor of one model by reading those of the other
Convert = Callable[..., tuple[Tensor, ...]]

_BARE = {"positions": "transformer.wpe.weight", "lm_head": "lm_head.weight"}  # not in a module
_GPT2 = {
    "embedding": "transformer.wte",
    "norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "attention.proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.expand.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_LLAMA = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "attention.qkv.q": "self_attn.q_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.expand.up": "mlp.up_proj",
    "mlp.expand.gate": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
}


def from_huggingface(name: str, family: Family, config: ModelConfig, read: Read) -> Tensor:
    """Make our full tensor `name` by reading theirs; linear, so it converts gradients too."""
    ours, theirs, to_ours, _ = _counterparts(name, family)
    return to_ours(config, *map(read, theirs))[ours.index(name)]


def to_huggingface(names: Iterable[str], family: Family, config: ModelConfig) -> dict[str, Make]:
    """Functions that make their tensors by reading ours, all of whose `names` are given.

    The exact inverse of `from_huggingface`.
    """
    made: dict[str, Make] = {}
    for name in names:
        ours, theirs, _, to_theirs = _counterparts(name, family)
        for index, their_name in enumerate(theirs):
            made[their_name] = partial(_make, ours, config, to_theirs, index)
    return made


def shapes_of(makers: Mapping[str, Make], shapes: Mapping[str, Sequence[int]]) -> dict[str, Size]:
    """The shapes of their tensors, from those of ours."""
    return {
        name: make(lambda ours: torch.empty(tuple(shapes[ours]), device="meta")).shape
        for name, make in makers.items()
    }


def _make(
    names: tuple[str, ...], config: ModelConfig, convert: Convert, index: int, read: Read
) -> Tensor:
    return convert(config, *map(read, names))[index]


def _counterparts(
    name: str, family: Family
) -> tuple[tuple[str, ...], tuple[str, ...], Convert, Convert]:
    """Our and their tensors that hold the numbers of our tensor `name`, and both conversions."""
    if name in _BARE:
        return (name,), (_BARE[name],), _same, _same
    module, _, leaf = name.rpartition(".")  # blocks.3.mlp.down.weight: leaf weight
    block = prefix = ""
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        block = f"blocks.{layer}."
        prefix = f"transformer.h.{layer}." if family == "gpt2" else f"model.layers.{layer}."
    if family == "gpt2" and module.startswith("attention.qkv."):
        ours = f"{block}attention.qkv.q.{leaf}", f"{block}attention.qkv.kv.{leaf}"
        return ours, (f"{prefix}attn.c_attn.{leaf}",), _split_qkv, _join_qkv
    if family == "gpt2":
        is_matrix = module.startswith(("attention.", "mlp.")) and leaf == "weight"
        convert = _transpose if is_matrix else _same
        return (name,), (f"{prefix}{_GPT2[module]}.{leaf}",), convert, convert
    if module == "attention.qkv.kv":
        keys, values = (f"{prefix}self_attn.{part}_proj.{leaf}" for part in "kv")
        return (name,), (keys, values), _join_kv, _split_kv
    return (name,), (f"{prefix}{_LLAMA[module]}.{leaf}",), _same, _same


def _same(_: ModelConfig, x: Tensor) -> tuple[Tensor]:
    return (x,)


def _transpose(_: ModelConfig, x: Tensor) -> tuple[Tensor]:
    return (x.t(),)


def _split_qkv(config: ModelConfig, qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.t().chunk(3)
    return q, *_join_kv(config, k, v)


def _join_qkv(config: ModelConfig, q: Tensor, kv: Tensor) -> tuple[Tensor]:
    return (torch.cat([q, *_split_kv(config, kv)]).t(),)


def _join_kv(config: ModelConfig, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """Keys and values, each `[g d, ...]`, to `[2 g d, ...]`, group by group."""
    groups = (config.num_groups, config.head_dim, *k.shape[1:])
    return (torch.stack([k.reshape(groups), v.reshape(groups)], dim=1).flatten(0, 2),)


def _split_kv(config: ModelConfig, kv: Tensor) -> tuple[Tensor, Tensor]:
    k, v = kv.unflatten(0, (config.num_groups, 2, config.head_dim)).unbind(1)
    return k.flatten(0, 1), v.flatten(0, 1)
