"""Checkpoints as streams: Hugging Face folders and NeMo checkpoints, one tensor at a time."""
