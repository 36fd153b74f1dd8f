"""The GPT as mathematics, written with parallel layers."""

from model.build import build_model, describe_model
from model.flops import flops_per_token, num_parameters
from model.gpt import GPT
from model.sampling import generate

__all__ = ["GPT", "build_model", "describe_model", "flops_per_token", "generate", "num_parameters"]
