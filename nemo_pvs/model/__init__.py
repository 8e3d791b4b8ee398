"""What a model is: its sizes (Shape), its table of weights (Layout), its Transformers class."""
