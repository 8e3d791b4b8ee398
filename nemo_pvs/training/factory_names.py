"""What our recipes, methods and launch profiles are called under NeMo's own command. Imports no NeMo."""

from __future__ import annotations

import re


def factory_name(recipe: str, arm: str) -> str:
    """Return ``pvs_smollm2_135m_demo_width_pruned`` for the arm ``width-pruned`` of ``smollm2_135m/demo``.

    NeMo-Run takes letters, digits and underscores only; a dot becomes a p, as in NeMo's own names.
    """
    return "pvs_" + re.sub(r"\W", "_", f"{recipe}_{arm}".replace(".", "p")).lower()


def prune_factory_name(method: str) -> str:
    """Return ``pvs_minitron_width`` for the method ``minitron-width``, under ``nemo llm prune --factory``."""
    return "pvs_" + re.sub(r"\W", "_", method)


def executor_name(profile: str) -> str:
    """Return ``pvs_slurm_h100`` for the launch profile ``slurm_h100``, under ``run.executor=``."""
    return "pvs_" + re.sub(r"\W", "_", profile)
