"""torchtitan: its Llama 3 at the workload's size, with its own parallelisation, loss and clipping.

Llama's architecture, because torchtitan has no other of this kind: RMSNorm, SwiGLU of 2/3 of the
width, rotary positions, no biases; its operations are counted as they are. bf16 is FSDP's mixed
precision, float32 weights and reduction, on one rank too. Changed from outside: its device is the
processor; attention is its class for torch's fused kernel, as flex attention has no backward there;
gradients over dp are reduced by sums, as gloo has no scaled ones; no Trainer, which needs CUDA. TP
is the DTensor backend: torch 2.13 has not what the newer one needs.
"""

import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend

from bench.timing import report_speed
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

_BACKEND = "partial_dtensor"
_FFN_MULTIPLE = 256  # torchtitan's own for its smallest Llama


def _use_processor() -> None:
    """Sets torchtitan's device; its other modules copy it when they are imported."""
    import torchtitan.tools.utils as tools

    tools.device_type, tools.device_module = "cpu", torch.cpu


def build_model(shape: Workload) -> tuple[Any, Any, int, int]:
    """The model, torchtitan's dimensions, the number of weights, and a layer's width of SwiGLU."""
    _use_processor()
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.tools.logging import logger

    logger.setLevel(logging.ERROR)
    ScaledDotProductAttention.sdpa_backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    h = shape.hidden_size
    ffn = llama3.compute_ffn_hidden_dim(h, multiple_of=_FFN_MULTIPLE)
    positions = llama3.ComplexRoPE.Config(
        dim=h // shape.num_attention_heads, max_seq_len=shape.seq_length, theta=500000
    )
    config = llama3.Llama3Model.Config(
        dim=h,
        vocab_size=shape.vocab_size,
        enable_weight_tying=True,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=shape.vocab_size,
            embedding_dim=h,
            param_init=llama3._EMBEDDING_SKIP_INIT,
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=h, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=h, out_features=shape.vocab_size, param_init=llama3._LINEAR_INIT
        ),
        layers=llama3._build_llama3_layers(
            n_layers=shape.num_layers,
            dim=h,
            n_heads=shape.num_attention_heads,
            hidden_dim=ffn,
            attn_backend="flex",
            rope=positions,
        ),
    )
    parallelism = ParallelismConfig(
        tensor_parallel_degree=shape.tp,
        data_parallel_shard_degree=shape.dp,
        enable_sequence_parallel=shape.sequence_parallel,
        spmd_backend=_BACKEND,
    )
    config.update_from_config(config=types.SimpleNamespace(parallelism=parallelism))
    dims = ParallelDims.from_config(parallelism, shape.num_ranks)
    dims.build_mesh()
    set_spmd_backend(_BACKEND)
    with torch.device("meta"):
        model = config.build()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    training = TrainingConfig(
        mixed_precision_param="bfloat16" if shape.precision == "bf16" else "float32",
        mixed_precision_reduce="float32",
        seq_len=shape.seq_length,
        local_batch_size=shape.micro_batch,
        disable_cuda_graphs=True,
    )
    model = llama3.parallelize_llama(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
        _start_alike(model, config)
    model.train()
    return model, dims, num_parameters, ffn


def _start_alike(model: Any, config: Any) -> None:
    """Load the weights that one process draws; on CPUs DTensor draws each shard separately."""
    torch.manual_seed(SEED)
    whole = config.build()
    whole.init_weights(buffer_device=None)
    for parameter, full in zip(model.parameters(), whole.parameters(), strict=True):
        if isinstance(parameter, DTensor):
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
        else:
            parameter.copy_(full)


def make_step(model: Any, dims: Any, shape: Workload, rank: int) -> Callable[[int], float]:
    """A step with torchtitan's loss and clipping and the AdamW that it uses."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed.utils import clip_grad_norm_, get_spmd_context

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    context = get_spmd_context(parallel_dims=dims, spmd_typechecking=False)
    step_batches = batches(shape, rank)
    places = torch.arange(shape.seq_length).expand(shape.micro_batch, -1).contiguous()

    def step(number: int) -> float:
        optimizer.zero_grad()
        (rows,) = step_batches(number)
        tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with context():
            logits = model(tokens, positions=places)
            loss = cross_entropy_loss(logits, targets, global_vocab_size=shape.vocab_size)
            loss = loss / shape.tokens_per_step
            loss.backward()
        clip_grad_norm_(list(model.parameters()), CLIP_GRAD, foreach=True)
        optimizer.step()
        return loss.item() * shape.dp

    return step


def main() -> int:
    """One side of the benchmark."""
    warnings.filterwarnings("ignore")
    arguments = parse()
    shape = arguments.workload
    rank = join(shape)
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    model, dims, num_parameters, ffn = build_model(shape)
    h = shape.hidden_size
    flops_per_token = shape.flops_per_token(4 * h * h + 3 * h * ffn)
    step = make_step(model, dims, shape, rank)
    report_speed(step, arguments, num_parameters, flops_per_token)
    return 0


if __name__ == "__main__":
    sys.exit(main())
