"""NeMo checkpoints: weights, the context that NeMo builds a model from, the optimizer state."""
