"""Pruning during training on Megatron: learned masks, removal of units, carried-over optimizer states."""
