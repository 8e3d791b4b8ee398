"""Greedy decoding of a ``transformers`` model with a KV cache that is allocated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [rows, groups, length, head_dim], which are written in place.

    ``DynamicCache`` copies all keys and values at every token, and ``StaticCache`` attends to empty slots too, for
    which it needs a mask. Here attention gets a view of the slots filled so far, and needs none.
    """

    is_sliding = False

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self._rows, self._length = rows, length
        self._filled = 0
        self._memory: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor) -> None:
        _, groups, _, size = key_states.shape
        self._memory = [key_states.new_empty(self._rows, groups, self._length, size) for _ in range(2)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        rows, _, new, _ = key_states.shape
        begin, self._filled = self._filled, self._filled + new
        keys, values = (memory[:rows, :, : self._filled] for memory in self._memory)
        keys[:, :, begin:] = key_states
        values[:, :, begin:] = value_states
        return keys, values

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        return self._filled + len(cache_position), 0

    def get_seq_length(self) -> int:
        return self._filled

    def get_max_cache_shape(self) -> int:
        return self._length

    def move(self, source: int, target: int) -> None:
        for memory in self._memory:
            memory[target, :, : self._filled] = memory[source, :, : self._filled]


class TransformersDecoder:
    """Sequences of equal length that a ``transformers`` model continues token by token."""

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        """Make an empty cache.

        Args:
            model: The model.
            rows: Maximum number of sequences.
            length: Maximum number of tokens in each.
        """
        self._model = model
        self._layers = [_Layer(rows, length) for _ in range(model.config.num_hidden_layers)]
        self._cache = Cache(layers=list(self._layers))

    @torch.no_grad()
    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """Read token ids [N, S] after all earlier ones and return the most probable next tokens [N], on the CPU."""
        ids = ids.to(self._model.device)
        logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].float().argmax(-1).cpu()

    def keep(self, rows: Sequence[int]) -> None:
        """Let sequence ``rows[i] >= i`` become sequence ``i`` and forget all others."""
        for target, source in enumerate(rows):
            if source != target:
                for layer in self._layers:
                    layer.move(source, target)
