"""Model architecture: sizes (Shape), table of weights (Layout), Transformers classes."""
