"""Text in, tokens out: reading a corpus, splitting it by document, writing Megatron's token files."""
