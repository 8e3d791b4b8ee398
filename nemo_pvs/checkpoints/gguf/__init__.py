"""GGUF files as checkpoints: the file, its tensors in the Hugging Face layout, its tokenizer."""

DTYPES = ("f32", "f16", "bf16", "q8_0")
"""How matrices can be stored, by llama.cpp's names."""
