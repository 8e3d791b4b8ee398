"""Sheared LLaMA: from learned masks to a pruned model (Xia et al., arXiv 2310.06694)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.gates import UNITS, FoldedSource, Gates, plan_of_gates
from nemo_pvs.pruning.learned.mask_learning import NAMES, MaskLearner
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.system.files import write_bytes

METHOD = "sheared-llama"
TOLERANCE = 0.02
"""Largest final difference between the expected sparsity of a kind of unit and its target, where it is more than one
unit of a layer (or, of hidden channels and layers, of the model)."""
_ROUNDING = 1e-5
_HEADER = "sheared"


def save_masks(path: Path, masks: MaskLearner) -> None:
    """Write the deterministic gates and the sparsities reached to a safetensors file, atomically."""
    header = {"target": masks.target.to_dict(), "sparsities": masks.sparsities(), "targets": masks.targets}
    gates = zip(UNITS, masks.deterministic().tensors, strict=True)
    tensors = {unit: tensor.cpu().contiguous() for unit, tensor in gates}
    write_bytes(path, save(tensors, {_HEADER: json.dumps(header)}))


def load_gates(path: Path, target: Shape) -> Gates:
    """Read the gates that ``save_masks`` wrote.

    Raises:
        UserError: the file is missing or of another kind, the masks have another target, or they did not reach it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[_HEADER])
            gates = Gates(**{unit: file.get_tensor(unit) for unit in UNITS})
        learned_for = Shape.from_dict(header["target"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold learned masks ({type(error).__name__}: {error}).") from None
    if learned_for != target:
        raise UserError(f"The masks in {path} were learned for [{learned_for}], not for [{target}].")
    check_reached(header["sparsities"], header["targets"], gates)
    return gates


def check_reached(sparsities: Mapping[str, float], targets: Mapping[str, float], gates: Gates) -> None:
    """Check that every kind of unit is within ``TOLERANCE``, or within one unit, of its target.

    Raises:
        UserError: one is not; the message has the sparsities reached.
    """
    missed = []
    for unit, target in targets.items():
        one_unit = 1 / getattr(gates, unit).shape[-1]
        if abs(sparsities[unit] - target) > max(TOLERANCE, one_unit) + _ROUNDING:
            missed.append(unit)
    if missed:
        shares = ", ".join(
            f"{sparsities[unit]:.1%} of the {NAMES[unit]} instead of {targets[unit]:.1%}" for unit in missed
        )
        raise UserError(
            f"The masks did not reach the target shape: they would remove {shares}; learn them for more tokens, or "
            "with a higher multiplier_learning_rate."
        )


def sheared_plan(source: WeightSource, gates: Gates, provenance: Mapping[str, Any]) -> tuple[PrunedSource, Plan]:
    """Return the pruned model and its plan: the gates folded into the weights, units with a zero gate removed.

    Args:
        source: The weights that were trained together with the masks.
        gates: The deterministic gates.
        provenance: Entries of the plan's provenance in addition to the model's fingerprint.
    """
    folded = FoldedSource(source, gates)
    plan = plan_of_gates(METHOD, shape_of(source), gates, {"model_fingerprint": fingerprint(folded), **provenance})
    return PrunedSource(folded, plan), plan
