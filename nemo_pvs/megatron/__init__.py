"""Training on NeMo and Megatron-Core; only this package and ``nemo_cli`` import them."""
