"""The GPT as mathematics, written with parallel layers."""

from model.build import build_bare_model, build_model, describe_model
from model.decoding import continuations, generate
from model.flops import flops_per_token, num_parameters
from model.gpt import GPT
from model.sampling import Sampling

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
