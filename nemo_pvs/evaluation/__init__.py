"""Evaluation of checkpoints: tasks and perplexity."""
