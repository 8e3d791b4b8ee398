"""GGUF files as checkpoints: the file, its tensors in the Hugging Face layout, its tokenizer."""
