"""Distillation on Megatron: teacher, losses and hidden states."""
