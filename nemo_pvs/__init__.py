"""Prune a Llama-family model, keep training it on Megatron, and compare it with training from scratch."""

__version__ = "0.1.0"
