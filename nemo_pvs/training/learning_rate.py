"""Learning rates relative to the peak: schedules of "Small LLMs: Pruning vs. Training from Scratch", of NeMo, WSD."""

from __future__ import annotations

import math


def quadratic_warmup_cosine(step: int, *, steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Return the fraction of the peak learning rate at a step, with quadratic warm-up and cosine decay.

    It is ``min(1 - (1 - min(t, w) / w)^2, m + (1 - m) / 2 (1 + cos(pi t / T)))`` and 0 after the end, as in the
    training code of 2606.14150 (``create_fms_style_schedule``): the cosine runs over all steps, not shifted by the
    warm-up.

    Args:
        step: Optimizer steps done (t), 0 in the first step.
        steps: Optimizer steps of the run (T).
        warmup_steps: Steps until the parabola reaches the peak (w); 0 for none.
        min_ratio: Fraction of the peak at the end (m).
    """
    if step > steps:
        return 0.0
    left = 1 - min(step, warmup_steps) / warmup_steps if warmup_steps else 0.0
    cosine = min_ratio + (1 - min_ratio) / 2 * (1 + math.cos(math.pi * step / steps))
    return min(1 - left**2, cosine)


def linear_warmup(step: int, *, steps: int, warmup_steps: int, min_ratio: float, decay_steps: int | None) -> float:
    """Return the fraction of the peak learning rate at a step, with linear warm-up and cosine or linear decay.

    It is ``(t + 1) / (w + 1)`` up to step w, then NeMo's cosine over the remaining steps. With ``decay_steps`` it is
    the peak until the last ``decay_steps`` steps, in which it falls linearly to the minimum (warm-up, stable, decay:
    Adapt-Pruner, 2502.03460).

    Args:
        step: Optimizer steps done (t), 0 in the first step.
        steps: Optimizer steps of the run (T).
        warmup_steps: Steps of the warm-up (w); 0 for none.
        min_ratio: Fraction of the peak at the end.
        decay_steps: Steps of the linear decay; None for a cosine.
    """
    if warmup_steps and step <= warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if step > steps:
        return min_ratio
    if decay_steps is None:
        left = (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))) / 2
    else:
        left = min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    return min_ratio + (1 - min_ratio) * left
