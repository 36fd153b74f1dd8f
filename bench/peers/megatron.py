"""megatron-core: GPTModel of its local specification, its DDP, its optimizer.

bf16 is Megatron's own scheme: bf16 weights, float32 main weights, gradients accumulated and reduced
in float32. Its torch.compile'd fusions are on. `--variant sdpa`: core attention by torch's fused
kernel, else Megatron's own, which holds the matrix of scores.
"""

import dataclasses
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]

from bench.activations import saved_per_layer
from bench.peers import megatron_on_cpu
from bench.timing import leave, report, report_speed
from bench.workload import (
    BETAS,
    CLIP_GRAD,
    EPS,
    LR,
    SEED,
    WEIGHT_DECAY,
    Workload,
    batches,
    join,
    parse,
)


def join_megatron(shape: Workload) -> int:
    """Joins the ranks and tells Megatron about them; returns this one's number."""
    warnings.filterwarnings("ignore")
    rank = join(shape)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    megatron_on_cpu.patch()
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=shape.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)
    return rank


def build_model(shape: Workload, fused_attention: bool) -> tuple[Any, int]:
    """The model inside Megatron's data parallelism, and the number of weights on this rank."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    is_bf16 = shape.precision == "bf16"
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        ffn_hidden_size=shape.ffn_hidden_size,
        tensor_model_parallel_size=shape.tp,
        sequence_parallel=shape.sequence_parallel,
        use_cpu_initialization=True,
        hidden_dropout=shape.dropout,
        attention_dropout=shape.attention_dropout,
        bf16=is_bf16,
        params_dtype=shape.dtype,
        pipeline_dtype=shape.dtype,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        cross_entropy_loss_fusion=True,
        # Kernels that exist for CUDA only.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    layer = get_gpt_layer_local_spec()
    if fused_attention:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = megatron_on_cpu.FusedCoreAttention
    block: Any = layer
    if shape.sequence_parallel:
        norm = megatron_on_cpu.MarkedLayerNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
        block = TransformerBlockSubmodules(layer_specs=[layer] * shape.num_layers, layer_norm=norm)
    model: Any = GPTModel(
        config,
        block,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.seq_length,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    if is_bf16:
        model = Float16Module(config, model)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=shape.dp > 1
    )
    return DistributedDataParallel(config, settings, model), num_parameters


def mean_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean loss of rows `[b, s + 1]`."""
    places = torch.arange(rows.shape[1] - 1).expand(rows.shape[0], -1).contiguous()
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return model(tokens, places, None, labels=targets).float().mean()


def make_step(model: Any, shape: Workload, rank: int) -> Callable[[int], float]:
    """A step with Megatron's optimizer, after its reduction of gradients."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=CLIP_GRAD,
        bf16=shape.precision == "bf16",
        params_dtype=shape.dtype,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    step_batches = batches(shape, rank)

    def step(number: int) -> float:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        (rows,) = step_batches(number)
        loss = mean_loss(model, rows)
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        return loss.item()

    return step


def main() -> int:
    """One side of the benchmark."""
    arguments = parse()
    shape, fused_attention = arguments.workload, arguments.variant == "sdpa"
    rank = join_megatron(shape)
    if arguments.measure == "activations":
        rows = batches(shape, rank)(0)[0]

        def make(num_layers: int) -> tuple[nn.Module, Callable[[], Tensor]]:
            smaller = dataclasses.replace(shape, num_layers=num_layers)
            model, _ = build_model(smaller, fused_attention)
            return model, lambda: mean_loss(model, rows)

        report(saved_per_layer(make, shape))
        leave()
    else:
        model, num_parameters = build_model(shape, fused_attention)  # of one rank
        report_speed(make_step(model, shape, rank), arguments, num_parameters)
    return 0


if __name__ == "__main__":
    sys.exit(main())
