"""FLOPs of what pruning reads: the layers that are really run, and no output head where nobody asks for logits."""

from __future__ import annotations

from nemo_pvs.model.shape import Shape


def calibration_flops(shape: Shape, tokens: int, sequence_length: int, *, gradients: bool = False) -> int:
    """Return the FLOPs of ``calibration.engine.calibrate``: every decoder layer once forward, and no output head.

    With gradients every layer runs twice more, to keep what it reads and on the way back, which is as much as two; and
    the output head runs once, with half a way back, for its weights have no gradients.
    """
    layers = sum(_layer_flops(shape, sequence_length))
    head = 2 * shape.vocab * shape.hidden
    return tokens * (layers + (4 * layers + 2 * head if gradients else 0))


def sparse_calibration_flops(shape: Shape, tokens: int, sequence_length: int, *, sequential: bool) -> int:
    """Return the forward FLOPs of ``pruning.sequential.prune_layers``.

    Args:
        shape: Of the dense model.
        tokens: Of the calibration text.
        sequence_length: Tokens a sequence, for the cost of attention.
        sequential: Every layer runs twice: dense up to the input of its last matrix, and pruned, which multiplies as
            many numbers as a dense one; but nobody reads what the pruned last layer puts out. Else once.
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
