"""Pruning: from scores to a plan, and from a plan to a smaller checkpoint."""
