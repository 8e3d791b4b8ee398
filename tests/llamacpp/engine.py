"""Runs GGUF files in llama.cpp, with a KV cache in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from llama_cpp import GGML_TYPE_F32, Llama


class Engine:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, context: int) -> None:
        settings = {"n_ctx": context, "n_batch": context, "n_ubatch": context, "n_threads": 2, "verbose": False}
        self.llama = Llama(str(path), logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, **settings)

    def ids(self, text: str) -> list[int]:
        """Return a text's token ids, with those that the file says to add."""
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Return the logits [S, V] of a sequence."""
        self.llama.reset()
        self.llama.eval(ids)
        return np.array(self.llama.scores[: len(ids)])

    def continued(self, ids: list[int], new_tokens: int) -> list[int]:
        """Return the most likely continuation, one token at a time."""
        sequence, position = list(ids), 0
        self.llama.reset()
        while len(sequence) < len(ids) + new_tokens:
            self.llama.eval(sequence[position:])
            position = len(sequence)
            sequence.append(int(self.llama.scores[position - 1].argmax()))
        return sequence[len(ids) :]
