"""Training on NeMo and Megatron-Core: the only rooms that import NeMo."""
