"""The GPT as mathematics, written with parallel layers."""

from configs.weights import flops_per_token, num_parameters
from model.build import build_inference_model, build_meta_model, build_model
from model.generation.decoding import generate, generate_tokens
from model.generation.sampling import Sampling
from model.gpt import GPT

__all__ = [
    "GPT",
    "Sampling",
    "build_inference_model",
    "build_meta_model",
    "build_model",
    "flops_per_token",
    "generate",
    "generate_tokens",
    "num_parameters",
]
