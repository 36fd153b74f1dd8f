"""Hugging Face transformers as the reference.

A case is a transformers model and our settings for the same function. The parent process gives the
model random weights, runs it in float64, and writes weights, logits, losses and gradients to a
file, so the ranks do not need transformers. Documents go through the model one by one, so that its
masks are not trusted.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from configs import Config, DataConfig, ModelConfig, TrainConfig
from interop.huggingface import Family, from_huggingface
from interop.huggingface_config import ARCHITECTURES
from model import GPT, build_model
from ops.segments import make_key_blocks
from parallel import Mesh, gather_json, local_gradients, local_shards, sum_partial_gradients
from tests.distributed import ONE_RANK, TENSOR_PARALLEL, Layout

LAYOUTS = (ONE_RANK, *TENSOR_PARALLEL, Layout(tp=2, dp=2))
VOCAB, LENGTH, PADDED_FROM = 23, 12, 9  # an odd vocabulary; the last row is padded
DOCUMENTS = [[0, 5, 11], [0, 1, PADDED_FROM]]  # where those of each row begin
Z_LOSS_COEFF = 0.1

# The settings of each family; a case adds to them.
_SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH}
_BASE: dict[Family, dict[str, Any]] = {
    "gpt2": {"norm_epsilon": 1e-5},
    "llama": {
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True,
        "ffn_hidden_size": 80,
    },
}
_BASE["qwen2"] = {**_BASE["llama"], "add_qkv_bias": True}
_BASE["qwen3"] = {**_BASE["llama"], "qk_layernorm": True}
_BASE["stablelm"] = {**_BASE["llama"], "normalization": "LayerNorm"}


@dataclass(frozen=True)
class Case:
    """A transformers model and our settings for it."""

    family: Family
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    several_documents: bool = False
    z_loss: bool = False

    @property
    def config(self) -> ModelConfig:
        """Our settings."""
        return ModelConfig(**{**_SHAPE, **_BASE[self.family], **self.ours})


CASES = {
    "GPT-2": Case("gpt2"),
    "GPT-2, exact GELU, untied": Case(
        "gpt2",
        {"activation_function": "gelu", "tie_word_embeddings": False},
        {"activation": "gelu", "untie_embeddings_and_output_weights": True},
    ),
    "GPT-2, z-loss": Case("gpt2", z_loss=True),
    "GPT-2, documents kept apart": Case("gpt2", several_documents=True),
    "Llama": Case("llama"),
    "Llama, tied, rotary base 500": Case(
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        {"untie_embeddings_and_output_weights": False, "rotary_base": 500.0},
    ),
    "Llama, 2 query groups": Case("llama", {"num_key_value_heads": 2}, {"num_query_groups": 2}),
    "Llama, 1 query group, biases": Case(
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"num_query_groups": 1, "add_bias_linear": True},
    ),
    "Llama, 2 query groups, documents kept apart, z-loss": Case(
        "llama",
        {"num_key_value_heads": 2},
        {"num_query_groups": 2},
        several_documents=True,
        z_loss=True,
    ),
    # Of the frequencies 1, 0.27 and 0.07, one is kept, one interpolated and one divided.
    "Llama 3.1's scaled RoPE, heads of 6": Case(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 30,
            }
        },
        {
            "kv_channels": 6,
            "rotary_base": 50.0,
            "rope_scaling_type": "llama3",
            "rope_scaling_factor": 4.0,
            "rope_original_max_position": 30,
        },
    ),
    "Qwen2 (biases of q, k and v), 2 query groups": Case(
        "qwen2", {"num_key_value_heads": 2}, {"num_query_groups": 2}
    ),
    "Qwen3 (QK-norm), 2 query groups": Case(
        "qwen3", {"num_key_value_heads": 2}, {"num_query_groups": 2}
    ),
    "Qwen3, heads of 14 in a width of 30": Case(
        "qwen3", {}, {"kv_channels": 14, "hidden_size": 30}
    ),
    "StableLM (half rotary), biases of q, k and v": Case(
        "stablelm",
        {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
        {"rotary_percent": 0.5, "add_qkv_bias": True},
    ),
}


# --- transformers ---


def their_model(case: Case) -> torch.nn.Module:
    """The transformers model in float64 with random weights: zeros and ones hide mistakes."""
    import transformers  # noqa: PLC0415  takes seconds; only the parent needs it

    config = case.config
    if case.family == "gpt2":
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCAB, n_positions=LENGTH, n_embd=config.hidden_size, bos_token_id=1,
                n_layer=config.num_layers, n_head=config.num_attention_heads, eos_token_id=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **case.theirs,
            )
        )  # fmt: skip
    else:
        name = ARCHITECTURES[case.family].removesuffix("ForCausalLM")
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_attention_heads,
            "head_dim": config.head_dim,
            "max_position_embeddings": LENGTH,
            "rms_norm_eps": config.norm_epsilon,
            "layer_norm_eps": config.norm_epsilon,
            "tie_word_embeddings": False,
        }
        their_config = getattr(transformers, f"{name}Config")(**{**shape, **case.theirs})
        theirs = getattr(transformers, f"{name}ForCausalLM")(their_config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            middle = 1.0 if "norm" in name or "ln_" in name else 0.0
            # In float32, so that both models start with the same numbers.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(middle + 0.2 * noise)
    return theirs.double().eval()


def batch(case: Case) -> dict[str, Any]:
    """The arguments of our model: two rows, the second one padded."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    targets = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    positions, key_blocks = torch.arange(LENGTH).repeat(2, 1), None
    if case.several_documents:
        key_blocks = make_key_blocks(LENGTH, DOCUMENTS)
        for row, begins in enumerate(DOCUMENTS):
            for begin in begins:
                positions[row, begin:] = torch.arange(LENGTH - begin)
    targets[1, PADDED_FROM:], positions[1, PADDED_FROM:] = -100, 0
    return {"tokens": tokens, "positions": positions, "targets": targets, "key_blocks": key_blocks}


def their_logits(theirs: torch.nn.Module, case: Case) -> Tensor:
    """Logits `[b, s, v]`, each document on its own from position 0."""
    tokens = batch(case)["tokens"]
    if not case.several_documents:
        return theirs(tokens).logits
    return torch.stack(
        [
            torch.cat([theirs(part[None]).logits[0] for part in row.tensor_split(begins[1:])])
            for row, begins in zip(tokens, DOCUMENTS, strict=True)
        ]
    )


def losses_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over targets of the cross-entropy and of log^2 sum exp."""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, logits.logsumexp(-1)[targets >= 0].square().sum()


def write_case(name: str, path: Path) -> None:
    """Run the transformers model; write weights, gradients, logits and losses to a file."""
    case = CASES[name]
    theirs = their_model(case)
    logits = their_logits(theirs, case)
    targets = batch(case)["targets"]
    loss, log_z_squared = losses_of(logits, targets)
    (loss + (Z_LOSS_COEFF * log_z_squared if case.z_loss else 0.0)).backward()
    tensors = {"logits": logits.detach(), "losses": torch.stack([loss, log_z_squared]).detach()}
    for parameter_name, parameter in theirs.named_parameters():
        assert parameter.grad is not None, parameter_name
        tensors[f"weights.{parameter_name}"] = parameter.detach()
        tensors[f"gradients.{parameter_name}"] = parameter.grad
    # A tied head is not a parameter.
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)


# --- ours ---


def load_weights(model: GPT, family: Family, tensors: dict[str, Tensor]) -> None:
    """Load transformers weights into a sharded GPT."""
    for name, shard in local_shards(model).items():
        full = from_huggingface(name, family, model.config, lambda key: tensors[f"weights.{key}"])
        assert full.shape == shard.global_shape, name
        shard.tensor.copy_(full[shard.slices])


def our_model(case: Case, mesh: Mesh, tensors: dict[str, Tensor]) -> GPT:
    """A float32 GPT with the weights of the case."""
    model = build_model(
        Config(
            model=case.config,
            data=DataConfig(vocab_size=VOCAB),
            train=TrainConfig(precision="fp32"),
        ),
        mesh,
    )
    load_weights(model, case.family, tensors)
    return model


@dataclass(frozen=True)
class Difference:
    """How much our float32 model differs from transformers in float64."""

    loss: float  # relative
    logits: float  # largest, as a fraction of the largest logit
    gradients: float  # largest, as a fraction of the largest element of the same gradient
    worst: str  # the weight of that gradient


def measure(mesh: Mesh, name: str, path: Path) -> Difference:
    """Compare logits, losses and the gradient of every weight on this layout."""
    case, tensors = CASES[name], load_file(path)
    model, inputs = our_model(case, mesh, tensors), batch(case)
    with torch.no_grad():
        logits = model(inputs["tokens"], inputs["positions"], key_blocks=inputs["key_blocks"])
    scored = inputs["targets"] >= 0
    expected = tensors["logits"][scored]
    logits_difference = (logits.double()[scored] - expected).abs().max() / expected.abs().max()

    losses = model(**inputs, z_loss_coeff=Z_LOSS_COEFF if case.z_loss else 0.0)
    # Every dp rank has the same batch, and gradients are summed.
    (losses.objective / mesh.dp.size).backward()
    sum_partial_gradients(local_gradients(model), mesh)
    loss_difference = (torch.stack(losses[1:3]).double() / tensors["losses"] - 1).abs().max()
    differences = []
    for weight, shard in local_shards(model, lambda parameter: parameter.grad).items():
        expected = from_huggingface(
            weight, case.family, case.config, lambda key: tensors[f"gradients.{key}"]
        )
        if shard.tensor.numel():
            error = (shard.tensor.double() - expected[shard.slices]).abs().max()
            differences.append([(error / expected.abs().max()).item(), weight])
    gradients, worst = max(max(of_rank) for of_rank in gather_json(mesh, differences))
    return Difference(loss_difference.item(), logits_difference.item(), gradients, worst)
