"""Depth pruning: remove the contiguous run of layers whose loss the model feels least (Minitron, 2407.14679)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise import MEMORY_LIMIT, LayerwiseModel
from nemo_pvs.pruning.plan import Plan, whole_layers
from nemo_pvs.shape import Shape


@dataclass(frozen=True)
class Scan:
    """The loss of a model without each run of ``removed`` neighbouring layers."""

    shape: Shape
    """The dense model."""
    model_fingerprint: str
    tokens: dict[str, Any]
    """Manifest of the token set."""
    removed: int
    losses: tuple[float, ...]
    """Loss (nats per token) without layers i to i + removed - 1, for i = 0 .. L - removed."""
    dense_loss: float
    layer_forwards: int
    """How often the whole token set went through a decoder layer."""

    @property
    def start(self) -> int:
        """First layer of the best run: the lowest loss, the first of equals."""
        return self.losses.index(min(self.losses))

    @property
    def tokens_read(self) -> int:
        """Tokens that went through the dense model and through every candidate."""
        return int(self.tokens["samples"] * self.tokens["sequence_length"]) * (len(self.losses) + 1)

    @property
    def flops(self) -> int:
        """Forward FLOPs of the scan: the layers that were really run, and the output head for every model."""
        length = self.tokens["sequence_length"]
        whole = self.shape.flops_per_token(sequence_length=length, training=False)
        shorter = self.shape.replace(layers=self.shape.layers - 1)
        layer = whole - shorter.flops_per_token(sequence_length=length, training=False)
        head = whole - self.shape.layers * layer
        tokens = self.tokens["samples"] * length
        return int(tokens * (self.layer_forwards * layer + (len(self.losses) + 1) * head))

    @property
    def reference_layer_forwards(self) -> int:
        """Layer forwards of a scan that runs every model from its first layer, as llm-pruning-collection does.

        The dense model (L layers), L' + 1 candidates of L' layers, and the winner once more.
        """
        kept = self.shape.layers - self.removed
        return self.shape.layers + (kept + 2) * kept


def scan_windows(
    source: WeightSource,
    tokens: TokenSet,
    remove: int,
    *,
    batch_size: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Measure the loss without each run of ``remove`` layers.

    One sweep from the first layer to the last, each read once. Candidate i shares the dense model's states up to
    layer i, waits there for ``remove`` layers, and then moves on with all others: the losses of whole models for about
    half of the work.

    Args:
        source: The dense model.
        tokens: Text to predict.
        remove: Layers to remove (k), 1 to L - 1.
        batch_size: Sequences a batch.
        dtype: Computing type.
        device: Where layers run.
        memory_limit: Bytes for hidden states, of which there is a copy per candidate; more text than fits is read in
            several sweeps.
        progress: Called with (layer forwards done, in all).

    Raises:
        UserError: there is nothing to remove or nothing would be left, or a loss is not finite.
    """
    layers = shape_of(source).layers
    if not 1 <= remove < layers:
        raise UserError(f"Cannot remove {remove} of {layers} layers; choose from 1 to {layers - 1}.")
    model = LayerwiseModel(source, dtype=dtype, device=device, memory_limit=memory_limit)
    candidates = layers - remove + 1
    chunks = list(model.chunks(tokens.ids, states=candidates + 1))
    forwards = len(chunks) * (layers + candidates * (candidates - 1) // 2)
    totals = torch.zeros(candidates + 1, dtype=torch.float64)
    predicted = 0
    done = 0

    def advance(layer: torch.nn.Module, states: torch.Tensor) -> None:
        nonlocal done
        model.run_layer(layer, states, batch_size)
        done += 1
        if progress:
            progress(done, forwards)

    for ids in chunks:
        dense = model.embed(ids[:, :-1])
        pruned: list[torch.Tensor] = []
        for index in range(layers):
            if len(pruned) < candidates:
                pruned.append(dense.clone())
            layer = model.layer(index)
            for states in pruned[: max(0, index - remove + 1)]:
                advance(layer, states)
            advance(layer, dense)
        results = [model.losses(states, ids[:, 1:]) for states in (*pruned, dense)]
        totals += torch.tensor([loss for loss, _ in results], dtype=torch.float64)
        predicted += results[-1][1]
    *losses, dense_loss = (totals / predicted).tolist()
    if not all(map(math.isfinite, (*losses, dense_loss))):
        raise UserError("The model's loss is not finite during the depth scan; is the checkpoint damaged?")
    return Scan(
        shape=model.shape,
        model_fingerprint=fingerprint(source),
        tokens=tokens.manifest,
        removed=remove,
        losses=tuple(losses),
        dense_loss=dense_loss,
        layer_forwards=done // len(chunks),
    )


def layers_to_remove(parent: Shape, target: Shape) -> int:
    """Return how many layers separate the two Shapes.

    Raises:
        UserError: they differ in width.
    """
    if parent.replace(layers=target.layers) != target:
        raise UserError(
            f"Depth pruning removes whole layers, but the target [{target}] differs from [{parent}] in width; "
            "prune the width as a step of its own."
        )
    return parent.layers - target.layers


def plan_depth(scan: Scan) -> Plan:
    """Remove the run of layers with the lowest loss.

    llm-pruning-collection takes the loss nearest to the dense model's instead, which would pass over a model that is
    better than the dense one.
    """
    layers = [layer for layer in range(scan.shape.layers) if not 0 <= layer - scan.start < scan.removed]
    return Plan(
        method="minitron-depth",
        parent=scan.shape,
        target=scan.shape.replace(layers=len(layers)),
        **whole_layers(scan.shape, layers),
        provenance={
            "model_fingerprint": scan.model_fingerprint,
            "tokens": scan.tokens,
            "settings": {"removed": scan.removed},
            "dense_loss": scan.dense_loss,
            "losses": list(scan.losses),
            "layer_forwards": scan.layer_forwards,
        },
    )
