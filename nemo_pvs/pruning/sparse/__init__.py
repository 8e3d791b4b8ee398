"""Methods that remove single weights: magnitude, Wanda, SparseGPT."""
