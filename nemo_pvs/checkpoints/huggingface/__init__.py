"""Hugging Face folders as checkpoints, and their configs in a normal form."""
