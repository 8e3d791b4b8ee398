"""Perplexity of a checkpoint, whatever its format, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.layerwise import MEMORY_LIMIT, LayerwiseModel


def perplexity(
    source: WeightSource,
    tokens: TokenSet,
    batch_size: int = 8,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return ``loss`` (mean next-token cross entropy, nats), its exponential ``perplexity``, and ``tokens`` predicted.

    Windows are independent and the first token of each is not predicted. Perplexity depends on the window length:
    compare only equal ones.

    Args:
        source: The model.
        tokens: Windows to predict.
        batch_size: Sequences a batch; changes speed and memory, not the result.
        dtype: Computing type.
        device: Where layers run.
        memory_limit: Bytes for hidden states; more text than that is read in several sweeps over the layers.
        progress: Called with (layers done, layers in all).

    Raises:
        UserError: the tokens do not fit the model.
    """
    model = LayerwiseModel(source, dtype=dtype, device=device, memory_limit=memory_limit)
    chunks = list(model.chunks(tokens.ids))
    total, count, done = 0.0, 0, 0
    for ids in chunks:
        hidden = model.embed(ids[:, :-1])
        for index in range(model.shape.layers):
            model.run_layer(model.layer(index), hidden, batch_size)
            done += 1
            if progress:
                progress(done, len(chunks) * model.shape.layers)
        loss, predicted = model.losses(hidden, ids[:, 1:])
        total, count = total + loss, count + predicted
    mean = total / count
    # An untrained or broken model can have a loss whose exponential is no longer a float.
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": count}
