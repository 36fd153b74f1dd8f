"""Hugging Face names, configurations, tokenizers and model cards."""
