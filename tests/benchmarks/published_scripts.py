"""SparseGPT and Wanda with the arithmetic of their published scripts, written plainly: what ours is measured against.

Every matrix keeps a statistic of its own inputs, seven a layer, although q, k and v read the same, and gate and up;
SparseGPT inverts every Hessian explicitly, between two Cholesky factorisations; one sequence passes at a time; the
whole model stays in memory. (SparseGPT: 2301.00774, algorithm 1, and the IST-DASLab/sparsegpt scripts; Wanda:
2306.11695, equation 1, and the locuslab/wanda scripts.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

BLOCK = 128
DAMPING = 0.01


class HessianOfOneMatrix:
    """``2 / N`` times the sum of ``x x^T``, kept as a mean while sequences come."""

    def __init__(self, inputs: int) -> None:
        self.total = torch.zeros(inputs, inputs)
        self.sequences = 0

    def add(self, activations: torch.Tensor) -> None:
        self.total *= self.sequences / (self.sequences + len(activations))
        self.sequences += len(activations)
        columns = math.sqrt(2 / self.sequences) * activations.flatten(0, 1).T.float()
        self.total += columns @ columns.T

    def pruned(self, weight: torch.Tensor, ratio: float, pattern: tuple[int, int] | None) -> torch.Tensor:
        """Return the matrix [outputs, inputs] with weights removed and the others updated, fp32."""
        hessian, weight = self.total.clone(), weight.float().clone()
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, weight.shape[1], BLOCK):
            end = min(start + BLOCK, weight.shape[1])
            columns, upper = weight[:, start:end].clone(), factor[start:end, start:end]
            errors = torch.zeros_like(columns)
            goes = torch.zeros_like(columns, dtype=torch.bool)
            if pattern is None:
                goes = up_to_rank((columns / upper.diagonal()).square(), ratio)
            for i in range(end - start):
                if pattern and i % pattern[1] == 0:
                    group = slice(i, i + pattern[1])
                    goes[:, group] = lowest_of_group((columns[:, group] / upper.diagonal()[group]).square(), pattern)
                errors[:, i] = columns[:, i] * goes[:, i] / upper[i, i]
                columns[:, i:] -= torch.outer(errors[:, i], upper[i, i:])
                columns[goes[:, i], i] = 0  # zero but for rounding
            weight[:, start:end] = columns
            weight[:, end:] -= errors @ factor[start:end, end:]
        return weight


class NormsOfOneMatrix:
    """The mean over sequences of the squares of each input."""

    def __init__(self, inputs: int) -> None:
        self.squares = torch.zeros(inputs)
        self.sequences = 0

    def add(self, activations: torch.Tensor) -> None:
        self.squares *= self.sequences / (self.sequences + len(activations))
        self.sequences += len(activations)
        columns = activations.flatten(0, 1).T.float()
        self.squares += columns.norm(dim=1).square() / self.sequences

    def pruned(self, weight: torch.Tensor, ratio: float, pattern: tuple[int, int] | None) -> torch.Tensor:
        """Return the matrix [outputs, inputs] with weights removed, in its own dtype."""
        scores = weight.abs().float() * self.squares.sqrt()
        goes = torch.zeros_like(scores, dtype=torch.bool)
        if pattern:
            for start in range(0, scores.shape[1], pattern[1]):
                group = slice(start, start + pattern[1])
                goes[:, group] = lowest_of_group(scores[:, group], pattern)
        else:
            order = scores.sort(dim=1, stable=True).indices
            goes.scatter_(1, order[:, : int(scores.shape[1] * ratio)], True)
        return weight.masked_fill(goes, 0)


def up_to_rank(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return which scores are up to the one of that rank; one more than the ratio's share, and ties."""
    return scores <= scores.flatten().sort().values[int(scores.numel() * ratio)]


def lowest_of_group(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """Return which scores of a group are its N lowest, row by row."""
    lowest = scores.topk(pattern[0], dim=1, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)


def watch(matrix: nn.Module, statistic: Any) -> Any:
    """Feed a statistic with what a matrix reads, until the handle is removed."""
    return matrix.register_forward_pre_hook(lambda _, inputs: statistic.add(inputs[0]))


STATISTICS = {"sparsegpt": HessianOfOneMatrix, "wanda": NormsOfOneMatrix}


@torch.no_grad()
def prune(model: Any, ids: torch.Tensor, method: str, ratio: float, pattern: tuple[int, int] | None) -> None:
    """Prune a transformers Llama in place.

    Args:
        model: The model, all of it.
        ids: Calibration tokens [N, S].
        method: wanda or sparsegpt.
        ratio: Share of the weights that go.
        pattern: N:M, or None for unstructured.
    """
    decoder = model.model
    states = torch.stack([decoder.embed_tokens(sequence) for sequence in ids.long()])
    outputs = torch.zeros_like(states)
    rotary = decoder.rotary_emb(states[:1], torch.arange(ids.shape[1])[None])

    def run(layer: nn.Module) -> None:
        for sequence in range(len(states)):
            outputs[sequence] = layer(states[sequence : sequence + 1], position_embeddings=rotary)[0]

    for layer in decoder.layers:
        matrices = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        statistics = {matrix: STATISTICS[method](matrix.in_features) for matrix in matrices}
        hooks = [watch(matrix, statistic) for matrix, statistic in statistics.items()]
        run(layer)
        for hook in hooks:
            hook.remove()
        for matrix, statistic in statistics.items():
            matrix.weight.copy_(statistic.pruned(matrix.weight, ratio, pattern))
        run(layer)
        states, outputs = outputs, states
