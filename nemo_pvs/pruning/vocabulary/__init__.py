"""Pruning the vocabulary: which tokens of a BPE tokenizer are kept, and the tokenizer's files without the others."""
