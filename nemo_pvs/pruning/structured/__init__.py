"""Methods that remove layers, channels, heads and neurons."""
