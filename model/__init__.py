"""The GPT as mathematics, written with parallel layers."""

from model.build import build_bare_model, build_model, describe_model
from model.flops import flops_per_token, num_parameters
from model.generation.decoding import continuations, generate
from model.generation.sampling import Sampling
from model.gpt import GPT

__all__ = [
    "GPT",
    "Sampling",
    "build_bare_model",
    "build_model",
    "continuations",
    "describe_model",
    "flops_per_token",
    "generate",
    "num_parameters",
]
