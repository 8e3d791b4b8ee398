"""Scaling laws of retraining after pruning: fits of loss curves, predictions from them, and advice."""
