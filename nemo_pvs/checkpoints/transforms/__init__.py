"""Weight sources that wrap other sources or generate weights: padded, with biases, random."""
