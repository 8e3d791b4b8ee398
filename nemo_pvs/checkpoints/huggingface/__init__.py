"""Hugging Face folders as checkpoints, and their configs in one normal form."""
