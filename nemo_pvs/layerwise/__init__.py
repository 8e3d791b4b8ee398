"""Run a model one layer at a time: forward pass, losses, perplexity, agreement with another model."""
