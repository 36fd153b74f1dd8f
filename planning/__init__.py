"""Support for plan.py: one real step on fake tensors, counted."""
