"""Text to tokens: reads a corpus, splits it by document, writes Megatron's token files."""
