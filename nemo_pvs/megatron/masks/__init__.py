"""Masks of sparse models, held while they are trained on any TP x PP x DP."""
