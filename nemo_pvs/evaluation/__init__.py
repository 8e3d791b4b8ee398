"""Evaluation: how good a checkpoint is."""
