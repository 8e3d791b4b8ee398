"""Checkpoints made from others, or from nothing, as they are read: padded, with biases, random."""
