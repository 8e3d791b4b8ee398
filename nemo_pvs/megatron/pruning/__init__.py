"""Pruning during training on Megatron: learned masks, units that are removed, optimizer states."""
