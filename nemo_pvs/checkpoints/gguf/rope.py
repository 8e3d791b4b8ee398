"""Llama 3.1's rope scaling as the frequency factors that a GGUF file stores, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def llama3_scaling(factors: npt.NDArray[np.float64], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the ``rope_scaling`` of config.json that yields these factors, or None if no setting does.

    Llama 3.1 leaves short wavelengths w unchanged, divides the frequencies of long ones by ``factor``, and those
    between by f, with 1/f = (1 - s) / factor + s where s = (context / w - low) / (high - low). So s is linear in 1/w
    and determined by the factors between 1 and the largest; scaling context, low and high together changes nothing,
    and low is 1 in all published models.

    Args:
        factors: The divisor of each frequency, (head_dim / 2), highest frequency first.
        theta: The base of the frequencies.
        head_dim: Channels per head.
    """
    if factors.shape != (head_dim // 2,) or not np.all(np.isfinite(factors)) or factors.min() < 0.999:
        return None
    largest = float(str(np.float32(factors.max())))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    between = (factors > 1.0001) & (factors < largest * 0.9999)
    if between.sum() < 2:
        return None
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(1 / wavelengths[between], smooth, 1)
    if intercept >= 0:
        return None
    high = round(1 - 1 / float(intercept), 3)
    scaling = {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(float(slope) * (high - 1)),
    }
    return scaling if np.allclose(llama3_factors(scaling, theta, head_dim), factors, rtol=1e-4) else None


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> npt.NDArray[np.float64]:
    """Return the divisor of each frequency under a ``rope_scaling`` of type llama3: (head_dim / 2), highest first."""
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = np.clip(smooth, 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))
