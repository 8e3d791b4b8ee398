"""Training on NeMo and Megatron-Core: with ``nemo_cli``, the only code that imports them."""
