"""ShortGPT: remove the layers that rotate their input least (2403.03853); needs scores only, no further pass."""

from __future__ import annotations

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.pruning.plan import Indices, Plan
from nemo_pvs.pruning.structured.depth import layer_plan, unprotected


def plan_shortgpt(scores: Scores, remove: int, *, protect_first: int = 0, protect_last: int = 0) -> Plan:
    """Remove the layers with the smallest block influence, ``1 - cos(input, output)`` averaged over all tokens.

    The cosines are computed in fp32; llm-pruning-collection computes them in bf16, where middle layers tie.

    Args:
        scores: Result of ``calibrate``.
        remove: Layers to remove (k), 1 to L - 1.
        protect_first: Layers at the input that are always kept.
        protect_last: Layers at the output that are always kept.

    Raises:
        UserError: ``remove`` is out of range, or too few layers are unprotected.
    """
    free = unprotected(scores.shape.layers, remove, protect_first, protect_last)
    influence = scores.tensors["block_influence"].tolist()
    removed = [layer for layer in removal_order(scores) if layer in free][:remove]
    provenance = {
        "model_fingerprint": scores.model_fingerprint,
        "scores": scores.content_hash,
        "settings": {"removed": remove, "protect_first": protect_first, "protect_last": protect_last},
        "block_influence": influence,
    }
    return layer_plan(scores.shape, removed, "shortgpt", provenance)


def removal_order(scores: Scores) -> Indices:
    """Return all layers by ascending block influence; of equal ones the later layer comes first."""
    influence = scores.tensors["block_influence"].tolist()
    return tuple(sorted(range(len(influence)), key=lambda layer: (influence[layer], -layer)))
