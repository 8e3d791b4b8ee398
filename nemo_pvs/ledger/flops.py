"""FLOPs of calibration and search: the layers that are actually run, and the output head only if logits are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nemo_pvs.model.shape import Shape


def calibration_flops(shape: Shape, tokens: int, sequence_length: int, *, gradients: bool = False) -> int:
    """Return the FLOPs of ``calibration.engine.calibrate``: one forward pass of every decoder layer, no output head.

    With gradients, every layer also runs forward once more to store its inputs and then backward, which costs two
    forward passes; the output head runs forward, and backward at half the cost because its weights need no gradients.

    Args:
        shape: The model's shape.
        tokens: Number of calibration tokens.
        sequence_length: Tokens per sequence, for the cost of attention.
        gradients: Whether gradients are computed.
    """
    layers = sum(_layer_flops(shape, sequence_length))
    head = 2 * shape.vocab * shape.hidden
    return tokens * (layers + (4 * layers + 2 * head if gradients else 0))


def sparse_calibration_flops(shape: Shape, tokens: int, sequence_length: int, *, sequential: bool) -> int:
    """Return the forward FLOPs of ``pruning.sparse.sequential.prune_layers``.

    Args:
        shape: Shape of the dense model.
        tokens: Number of calibration tokens.
        sequence_length: Tokens per sequence, for the cost of attention.
        sequential: Whether every layer runs twice: dense up to the input of its last matrix, and pruned, at the cost
            of a dense layer, except for the last layer, whose output is not needed. Otherwise every layer runs once.
    """
    layers = _layer_flops(shape, sequence_length)
    if not sequential:
        return tokens * sum(layers)
    last_matrices = sum(2 * shape.hidden * sizes.ffn for sizes in shape.layer_sizes)
    return tokens * (sum(layers) - last_matrices + sum(layers[:-1]))


def _layer_flops(shape: Shape, sequence_length: int) -> list[int]:
    """Return the forward FLOPs per token of each decoder layer."""
    head = 2 * shape.vocab * shape.hidden
    return [
        shape.with_layers([sizes]).flops_per_token(sequence_length=sequence_length, training=False) - head
        for sizes in shape.layer_sizes
    ]


def count_forwards(layers: int, width: int, starts: Sequence[int], *, whole: bool = True) -> int:
    """Return the number of layer forward passes of one ``LayerSweep.losses``."""
    return sum(layers - width - start for start in starts) + (layers if whole else max(starts))


class ScanCost(NamedTuple):
    """The cost of a scan for layers to remove."""

    models: int
    """Number of models whose loss is measured, including the dense one."""
    layer_forwards: int
    """Number of passes of the text through a decoder layer."""


def window_scan_cost(layers: int, width: int) -> ScanCost:
    """Return the cost of measuring a model without each run of ``width`` consecutive layers."""
    starts = range(layers - width + 1)
    return ScanCost(1 + len(starts), count_forwards(layers, width, starts))


def greedy_scan_cost(layers: int, removed: int, *, protect_first: int, protect_last: int) -> ScanCost:
    """Return the cost of removing ``removed`` layers one at a time, each the best of the unprotected ones."""
    models, forwards = 1, 0
    for step in range(removed):
        starts = range(protect_first, layers - protect_last - step)
        models += len(starts)
        forwards += count_forwards(layers - step, 1, starts, whole=step == 0)
    return ScanCost(models, forwards)


def sweep_flops(shape: Shape, tokens: Mapping[str, Any], layer_forwards: float, models: int) -> int:
    """Return the forward FLOPs of sweeps: the layers that were actually run, and the output head for every model.

    Args:
        shape: Shape of the dense model; uneven layers count as their mean.
        tokens: Manifest of the token set.
        layer_forwards: Number of passes of the text through a decoder layer.
        models: Number of models whose loss was measured.
    """
    length = tokens["sequence_length"]
    sizes = shape.layer_sizes
    whole, one_layer, two_layers = (
        shape.with_layers(layers).flops_per_token(sequence_length=length, training=False)
        for layers in (sizes, sizes[:1], sizes[:1] * 2)
    )
    head = 2 * one_layer - two_layers
    per_token = layer_forwards * (whole - head) / shape.layers + models * head
    return round(tokens["samples"] * length * per_token)


def sweep_tokens(tokens: Mapping[str, Any], models: int) -> int:
    """Return the total number of tokens processed by ``models`` models."""
    return int(tokens["samples"] * tokens["sequence_length"]) * models
