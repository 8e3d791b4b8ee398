"""Scaling laws of retraining after pruning: fits of loss curves, what they predict, and the advice that follows."""
