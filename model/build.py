"""From a configuration to a model that is sharded, placed and initialised."""

import torch

from configs.schema import Config
from model.gpt import GPT
from parallel import Mesh, initialise_parameters, shard_over_data_parallel

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_meta_model(config: Config, mesh: Mesh) -> GPT:
    """The GPT of a configuration, sharded, on the meta device: it takes no memory."""
    model = GPT(config.model, config.data.vocab_size, mesh, config.parallel.recompute_granularity)
    compute_dtype = COMPUTE_DTYPE[config.train.precision]
    shard_over_data_parallel(
        model,
        model.blocks,
        mesh,
        compute_dtype,
        overlap=config.parallel.dp_comm_overlap,
        one_sum_a_step=config.parallel.gradient_sync == "step",
    )
    return model


def build_model(config: Config, mesh: Mesh) -> GPT:
    """The GPT of a configuration: described without memory, sharded, then given its weights.

    No rank ever holds more than its shard of the model and one full tensor of the initialisation.
    """
    model = build_meta_model(config, mesh)
    model.to_empty(device=mesh.device)
    initialise_parameters(model, config.run.seed, mesh)
    return model


def build_inference_model(config: Config, mesh: Mesh) -> GPT:
    """The GPT of a configuration for use without training, its weights not set yet.

    Every rank has its tensor-parallel shard of all weights, in the precision of computation;
    nothing is cut over dp, gathered or kept twice.
    """
    model = GPT(config.model, config.data.vocab_size, mesh)
    model.requires_grad_(False)
    model.to(COMPUTE_DTYPE[config.train.precision])
    model.to_empty(device=mesh.device)
    return model
