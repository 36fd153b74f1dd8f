"""Weights of Hugging Face models as ours, and ours as theirs: which tensor is found in which.

Three families compute what a GPT of ours does, given the right options: `gpt2` (GPT2LMHeadModel),
`llama` (LlamaForCausalLM), and `qwen3` (Qwen3ForCausalLM: a Llama with QK-norm). Only names and
layouts are known here; transformers is not imported.

Theirs differ from ours in three ways. GPT-2 keeps its matrices as [in, out] and q, k and v as one.
Llama has k and v apart. Ours has them group by group: the rows of a group's key, then of its value.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from configs.schema import ModelConfig

Family = Literal["gpt2", "llama", "qwen3"]
Read = Callable[[str], Tensor]  # a tensor in full, by its name
Make = Callable[[Read], Tensor]  # a tensor of one side, from reading the other

_BARE = {"positions": "transformer.wpe.weight", "lm_head": "lm_head.weight"}  # of no module
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
    """Our tensor `name` in full, from theirs.

    Linear in what is read, so that it takes their gradients to ours as well.
    """
    if name in _BARE:
        return read(_BARE[name])
    layer, module, leaf = _split(name)
    if family == "gpt2":
        return _from_gpt2(layer, module, leaf, config, read)
    return _from_llama(layer, module, leaf, config, read)


def to_huggingface(names: Iterable[str], family: Family, config: ModelConfig) -> dict[str, Make]:
    """Their tensors, each as a function of reading ours; `names` are those of all of ours.

    The inverse of `from_huggingface`, to the bit.
    """
    made: dict[str, Make] = {}
    for name in names:
        if name in _BARE:
            made[_BARE[name]] = partial(_as_it_is, name)
        elif family == "gpt2":
            made |= _to_gpt2(name, config)
        else:
            made |= _to_llama(name, config)
    return made


def _split(name: str) -> tuple[str, str, str]:
    """`blocks.3.mlp.down.weight` is layer 3's, of module `mlp.down`, leaf `weight`."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("blocks."):
        return "", module, leaf
    _, layer, module = module.split(".", 2)
    return layer, module, leaf


def _from_gpt2(layer: str, module: str, leaf: str, config: ModelConfig, read: Read) -> Tensor:
    prefix = f"transformer.h.{layer}." if layer else ""
    if module.startswith("attention.qkv."):
        q, k, v = read(f"{prefix}attn.c_attn.{leaf}").t().chunk(3)
        return q if module == "attention.qkv.q" else _join_keys_and_values(k, v, config)
    tensor = read(f"{prefix}{_GPT2[module]}.{leaf}")
    return tensor.t() if _is_transposed(module, leaf) else tensor


def _to_gpt2(name: str, config: ModelConfig) -> dict[str, Make]:
    layer, module, leaf = _split(name)
    prefix = f"transformer.h.{layer}." if layer else ""
    if module == "attention.qkv.kv":
        return {}  # it goes with q
    if module == "attention.qkv.q":
        kv = name.replace("qkv.q", "qkv.kv")
        return {f"{prefix}attn.c_attn.{leaf}": partial(_join_qkv, name, kv, config)}
    make = _transposed if _is_transposed(module, leaf) else _as_it_is
    return {f"{prefix}{_GPT2[module]}.{leaf}": partial(make, name)}


def _is_transposed(module: str, leaf: str) -> bool:
    return module.startswith(("attention.", "mlp.")) and leaf == "weight"


def _from_llama(layer: str, module: str, leaf: str, config: ModelConfig, read: Read) -> Tensor:
    prefix = f"model.layers.{layer}." if layer else ""
    if module == "attention.qkv.kv":
        k, v = (read(f"{prefix}self_attn.{part}_proj.{leaf}") for part in "kv")
        return _join_keys_and_values(k, v, config)
    return read(f"{prefix}{_LLAMA[module]}.{leaf}")


def _to_llama(name: str, config: ModelConfig) -> dict[str, Make]:
    layer, module, leaf = _split(name)
    prefix = f"model.layers.{layer}." if layer else ""
    if module == "attention.qkv.kv":
        return {
            f"{prefix}self_attn.{part}_proj.{leaf}": partial(_keys_or_values, name, index, config)
            for index, part in enumerate("kv")
        }
    return {f"{prefix}{_LLAMA[module]}.{leaf}": partial(_as_it_is, name)}


def _as_it_is(name: str, read: Read) -> Tensor:
    return read(name)


def _transposed(name: str, read: Read) -> Tensor:
    return read(name).t()


def _join_qkv(q: str, kv: str, config: ModelConfig, read: Read) -> Tensor:
    return torch.cat([read(q), *_split_keys_and_values(read(kv), config)]).t()


def _keys_or_values(kv: str, index: int, config: ModelConfig, read: Read) -> Tensor:
    return _split_keys_and_values(read(kv), config)[index]


def _join_keys_and_values(k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """Rows `[g d, ...]` of keys and of values to `[2 g d, ...]`, group by group."""
    groups = (config.num_groups, config.head_dim, *k.shape[1:])
    return torch.stack([k.reshape(groups), v.reshape(groups)], dim=1).flatten(0, 2)


def _split_keys_and_values(kv: Tensor, config: ModelConfig) -> list[Tensor]:
    """Rows `[2 g d, ...]`, group by group, to those of keys and of values, each `[g d, ...]`."""
    groups = kv.unflatten(0, (config.num_groups, 2, config.head_dim))
    return [part.flatten(0, 1) for part in groups.unbind(1)]
