"""Reads and writes checkpoints of Megatron-Bridge and Megatron-LM."""
