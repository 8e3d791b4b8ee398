"""Estimate the GPU time of trainings from their FLOPs, and say why a layout is as it is; no GPU is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training

H100_BYTES = 80e9
"""Memory of one GPU."""
USABLE_BYTES = 0.9 * H100_BYTES
"""What a training may take of it; the rest is for NCCL buffers, kernel workspaces and fragmentation."""
PEAK_FLOPS = {"bf16": 989.4e12, "fp8": 1978.9e12}
"""Dense FLOPs per second of an H100 SXM, from NVIDIA's data sheet."""
_BF16_OF_OTHERS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H200 NVL": 835.5e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312e12,
}
"""Dense bf16 FLOPs per second by words of the device's name, the first that fit."""
_WITHOUT_FP8 = ("A100",)
MFU = {"bf16": 0.40, "fp8": 0.37}
"""Model FLOPs utilisation to expect; models of fewer than about a billion parameters reach less."""
MFU_SOURCE = {
    "bf16": "Llama 3 on 8,192 and 16,384 H100s: 38 to 43 %, arXiv 2407.21783, Table 4",
    "fp8": "LLAMA3-8B on 8 H100s: 744 TFLOPs per second, NVIDIA's performance summary for the NeMo 25.11 container",
}
"""Their sources, for people."""
_HOUR = 3600.0


def gpu_hours(flops: float, precision: str, mfu: float | None = None) -> float:
    """Return the GPU-hours of a training.

    Args:
        flops: Its model FLOPs, without recomputation.
        precision: ``bf16``, ``fp8``, or ``auto``, which is bf16 on GPUs.
        mfu: Model FLOPs utilisation; by default that of ``MFU``.
    """
    kind = "fp8" if precision == "fp8" else "bf16"
    return flops / (PEAK_FLOPS[kind] * (MFU[kind] if mfu is None else mfu)) / _HOUR


def peak_flops(device: str, precision: str) -> float | None:
    """Return the dense FLOPs per second of a GPU; None if it is not known here, or for fp32.

    Args:
        device: Its name as CUDA reports it: ``NVIDIA H100 80GB HBM3``.
        precision: ``bf16``, ``fp8`` or ``fp32``.
    """
    name = next((part for part in _BF16_OF_OTHERS if re.search(rf"\b{part}\b", device)), None)  # not an RTX A1000
    if name is None or precision == "fp32" or (precision == "fp8" and name in _WITHOUT_FP8):
        return None
    return _BF16_OF_OTHERS[name] * (2 if precision == "fp8" else 1)


def training_flops(ledger: Ledger) -> float:
    """Return the FLOPs of an arm's own training and of its teacher's forward passes in it."""
    teacher = [charge.flops or 0 for charge in ledger.charges if charge.activity == "teacher" and charge.steps]
    return float(sum(teacher) + (ledger.training.flops or 0))


def explain_layout(shape: Shape, layout: Parallelism, training: Training, teacher: Shape | None = None) -> str:
    """Return why a layout splits a model as it does: what one GPU would need without each split.

    Args:
        shape: Sizes of the model.
        layout: How it is split.
        training: Settings of the training run.
        teacher: Sizes of the teacher, if there is one.

    Example:
        ``CP 2, because without it a GPU would need 92 GB of the usable 72``
    """
    usable = f"of the usable {USABLE_BYTES / 1e9:.0f}"

    def need(**changes: object) -> float:
        return training_memory(shape, layout.model_copy(update=changes), training, teacher).total

    def reason(choice: str, **otherwise: object) -> str:
        needed = need(**otherwise)
        if needed > USABLE_BYTES:
            return f"{choice}, because without it a GPU would need {needed / 1e9:,.0f} GB {usable}"
        return f"{choice}, the recipe's choice, although {needed / 1e9:,.0f} GB would fit without it"

    one_stage: dict[str, object] = {
        "pipeline_parallel": 1,
        "virtual_pipeline": None,
        "first_stage_layers": None,
        "last_stage_layers": None,
    }
    reasons = []
    if layout.tensor_parallel > 1:
        reasons.append(reason(f"TP {layout.tensor_parallel}", tensor_parallel=1, sequence_parallel=False))
    if layout.pipeline_parallel > 1:
        reasons.append(reason(f"PP {layout.pipeline_parallel}", **one_stage))
    if layout.context_parallel > 1:
        reasons.append(reason(f"CP {layout.context_parallel}", context_parallel=1))
    if layout.recompute != "none":
        reasons.append(reason(f"{layout.recompute} recomputation", recompute="none"))
    needed = f"{need() / 1e9:,.0f} GB {usable}"
    if need() > USABLE_BYTES:
        reasons.insert(0, f"does not fit: a GPU would need {needed}")
    elif not reasons:
        reasons.append(f"whole on each GPU ({needed}), so that only the optimizer communicates")
    sequences = layout.micro_batch_size or training.micro_batch_size
    if sequences > 1:
        reasons.append(f"{sequences} sequences at once, because they fit: larger matrix products")
    return "; ".join(reasons)


def explain_kernels(layouts: Iterable[Parallelism], training: Training) -> str:
    """Return what else trainings in these layouts use on GPUs, in one line.

    Args:
        layouts: The layouts.
        training: Settings of the trainings.
    """
    used = [
        "NCCL averages gradients as it sums them (average_in_collective)",
        "Transformer Engine's cross entropy makes no fp32 copy of the logits"
        + (", except in distilled arms, whose divergence needs them" if training.distill else ""),
    ]
    if (
        any(layout.tensor_parallel > 1 and layout.sequence_parallel for layout in layouts)
        and training.precision != "fp8"
    ):
        used.append("TP overlaps its communication where the GPUs have CUDA multicast")
    return "; ".join(used)
