"""Distillation on Megatron: the teacher, the losses, hidden states."""
