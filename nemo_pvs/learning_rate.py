"""The learning-rate schedule of "Small LLMs: Pruning vs. Training from Scratch" (2606.14150)."""

from __future__ import annotations

import math


def quadratic_warmup_cosine(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the share of the peak learning rate at a step, the first of which is 0 and has 0.

    ``min(1 - (1 - min(t, w) / w)^2, m + (1 - m) / 2 (1 + cos(pi t / T)))``, and 0 behind the end, as in the training
    code of the paper (``create_fms_style_schedule``): the cosine runs over all steps, not shifted by the warm-up.

    Args:
        step: Optimizer steps done (t).
        steps: Optimizer steps of the run (T).
        warmup_steps: Steps until the parabola has reached the peak (w); 0 for none.
        min_ratio: Share of the peak at the end (m).
    """
    if step > steps:
        return 0.0
    left = 1 - min(step, warmup_steps) / warmup_steps if warmup_steps else 0.0
    cosine = min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * step / steps))
    return min(1 - left**2, cosine)
