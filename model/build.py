"""Build a model from a configuration: sharded, placed and initialised."""

import torch

from configs.schema import Config
from model.gpt import GPT
from parallel import Mesh, initialise_parameters, shard_over_data_parallel

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_meta_model(config: Config, mesh: Mesh) -> GPT:
    """Build the sharded model on the meta device, without memory."""
    dtype = COMPUTE_DTYPE[config.train.precision]
    recompute = config.parallel.recompute_granularity
    model = GPT(config.model, config.data.padded_vocab_size, mesh, recompute, dtype)
    shard_over_data_parallel(
        model,
        model.blocks,
        mesh,
        dtype,
        reshard_after_forward=config.parallel.reshard_after_forward and mesh.pp.size == 1,
    )
    return model


def build_model(config: Config, mesh: Mesh) -> GPT:
    """Build the sharded model and initialise it, with at most one full weight in memory."""
    model = build_meta_model(config, mesh)
    model.to_empty(device=mesh.device)
    initialise_parameters(model, config.run.seed, mesh)
    return model


def build_inference_model(config: Config, mesh: Mesh) -> GPT:
    """Build a tp shard of the model without FSDP2; weights are unset, in the compute dtype."""
    dtype = COMPUTE_DTYPE[config.train.precision]
    model = GPT(config.model, config.data.padded_vocab_size, mesh, dtype=dtype)
    model.requires_grad_(False)
    model.to(dtype)
    model.to_empty(device=mesh.device)
    return model
