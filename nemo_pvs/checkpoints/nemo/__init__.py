"""NeMo checkpoints: weights, the context from which NeMo builds the model, and the optimizer state."""
