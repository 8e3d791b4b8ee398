"""Small models whose weights are the same on every machine, and a text for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_tiny_llama, save_tiny_tokenizer


def make_exact_llama(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a tiny Llama with exact weights and a tokenizer in ``folder``, and return ``folder``."""
    make_tiny_llama(folder, dtype=dtype, **overrides)
    return with_exact_weights(save_tiny_tokenizer(folder, overrides.get("vocab_size", 128)))


def with_exact_weights(folder: Path) -> Path:
    """Replace the weights of a saved model by others, and return ``folder``.

    They are whole numbers divided by a power of two: PyTorch's normal distribution rounds differently on other CPUs.
    """
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in sorted(load_file(path).items()):
        numbers = torch.randint(-(2**23), 2**23, tensor.shape, generator=generator) / 2**24  # uniform in [-1/2, 1/2)
        weights[name] = (1 + numbers if tensor.ndim == 1 else numbers / 4).to(tensor.dtype)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def make_text(path: Path, vocab: int = 128, documents: int = 60) -> Path:
    """Write documents of the tokenizer's words, a song that a model can learn, as .jsonl, and return ``path``."""
    generator = random.Random(0)
    words = [f"w{generator.randint(2, vocab - 1)}" for _ in range(61)]
    texts = (" ".join(words[number % 61 :] + words * 5) for number in range(documents))
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path
