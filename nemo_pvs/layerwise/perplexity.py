"""Perplexity of a checkpoint of any format, computed layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import ON_CPU, Compute, LayerwiseModel
from nemo_pvs.system import ranks


def perplexity(
    source: WeightSource,
    tokens: TokenSet,
    compute: Compute = ON_CPU,
    *,
    stride: int | None = None,
    token_bytes: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return ``loss`` (mean next-token cross entropy, nats), its exponential ``perplexity``, and ``tokens`` predicted.

    The result also has their standard errors, ``loss_stderr`` and ``perplexity_stderr`` (None for a single window):
    the windows are the sample, and the perplexity's error is the loss's times the perplexity (delta method).

    Windows are independent and the first token of each is not predicted. Perplexity depends on the window length:
    compare only equal ones, of models with the same tokenizer. Under ``torch.distributed`` the ranks share the
    windows.

    With ``token_bytes`` the result also has ``bits_per_byte``, its standard error and the ``bytes`` predicted. It is
    comparable between tokenizers: the same text has the same bytes, whatever its tokens.

    Args:
        source: The model.
        tokens: Windows to predict.
        compute: Where and how layers run.
        stride: For sliding windows, each of which begins ``stride`` tokens after the previous one: of all but the
            first only the last ``stride`` tokens are predicted, so every token is predicted once, with a long context.
        token_bytes: The number of bytes that each token stands for, int64 [ids] (``data.token_bytes``).
        progress: Called with (layers done, their total).

    Raises:
        UserError: the tokens do not fit the model, or there are fewer windows than ranks.
    """
    model = LayerwiseModel(source, compute)
    indices = ranks.split(torch.arange(len(tokens.ids)))
    chunks, windows = list(model.chunks(tokens.ids[indices])), iter(indices.tolist())
    losses, done = torch.zeros(len(tokens.ids), 3, dtype=torch.float64), 0
    for ids in chunks:
        hidden = model.embed(ids[:, :-1])
        for index in range(model.shape.layers):
            model.run_layer(model.layer(index), hidden, compute.batch_size)
            done += 1
            if progress:
                progress(done, len(chunks) * model.shape.layers)
        for states, targets in zip(hidden, ids[:, 1:], strict=True):
            window = next(windows)
            scored = slice(-stride if stride and window else None, None)
            losses[window, :2] = torch.tensor(
                model.losses(states[None, scored], targets[None, scored]), dtype=torch.float64
            )
            if token_bytes is not None:
                losses[window, 2] = token_bytes[targets[scored].long().cpu()].sum()
        del hidden, states  # before the next ones take their memory
    losses = ranks.all_reduce(losses)
    measured = loss_statistics(losses[:, :2])
    # The exponential of an untrained or broken model's loss can overflow.
    value = math.exp(measured["loss"]) if measured["loss"] < 700 else math.inf
    error = None if measured["loss_stderr"] is None else value * measured["loss_stderr"]
    return {**measured, "perplexity": value, "perplexity_stderr": error, **_bits_per_byte(losses[:, [0, 2]])}


def _bits_per_byte(losses: torch.Tensor) -> dict[str, Any]:
    """Return bits per byte with their standard error, from loss (nats) and bytes per window; nothing without bytes."""
    if not losses[:, 1].sum():
        return {}
    measured = loss_statistics(losses)
    error = measured["loss_stderr"]
    return {
        "bits_per_byte": measured["loss"] / math.log(2),
        "bits_per_byte_stderr": None if error is None else error / math.log(2),
        "bytes": measured["tokens"],
    }


def loss_statistics(losses: Sequence[tuple[float, int]] | torch.Tensor) -> dict[str, Any]:
    """Return the mean loss per token of windows, with its standard error as a ratio estimator over windows.

    Args:
        losses: Summed loss (nats) and number of predicted tokens of each window [windows, 2].
    """
    sums, counts = torch.as_tensor(losses, dtype=torch.float64).T
    mean, windows = float(sums.sum() / counts.sum()), len(sums)
    residuals = float(((sums - mean * counts) ** 2).sum())
    error = (residuals * windows / (windows - 1)) ** 0.5 / float(counts.sum()) if windows > 1 else None
    return {"loss": mean, "loss_stderr": error, "tokens": int(counts.sum())}
