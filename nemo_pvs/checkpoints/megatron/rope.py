"""Megatron's scaled rotary embedding, which is that of Llama 3 with one setting: the factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_pvs.errors import UserError

# What Megatron-Core's RotaryEmbedding fixes.
_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_scaling(factor: Any) -> dict[str, Any]:
    """Return Hugging Face's ``rope_scaling`` for a factor.

    Raises:
        UserError: it is not a number.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise UserError(f"The checkpoint has {factor!r} for its rope scaling factor, which must be a number.")
    return {"rope_type": "llama3", **_FIXED, "factor": factor}


def rope_factor(config: Mapping[str, Any]) -> float | None:
    """Return the factor by which a model's rotary embedding is scaled; None if it is not.

    Raises:
        UserError: Megatron cannot express the scaling.
    """
    scaling = {key: value for key, value in (config.get("rope_scaling") or {}).items() if key != "type"}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return None
    factor = scaling.get("factor")
    if factor is None or scaling != rope_scaling(factor):
        stated = ", ".join(f"{key} {value}" for key, value in scaling.items() if key != "rope_type")
        raise UserError(
            f"The rope_scaling of this model is {kind} ({stated}), but Megatron-LM and Megatron-Bridge have only "
            "llama3 with low_freq_factor 1, high_freq_factor 4 and original_max_position_embeddings 8192; keep it in "
            "another format."
        )
    return float(factor)
