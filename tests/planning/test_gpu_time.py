"""GPU-hours and the reasons of layouts, by hand."""

from __future__ import annotations

import pytest

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.gpu_time import H100_BYTES, MFU, explain_layout, gpu_hours, training_flops
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.recipe.training import Training

LLAMA_8B = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False)
TRAINING = Training(
    tokens=1e9,
    sequence_length=8192,
    global_batch_size=128,
    learning_rate=1e-4,
    validation_samples=128,
    precision="bf16",
)
_USABLE = 0.9
"""Share of a GPU's memory; the rest is for NCCL, kernels and fragmentation."""


def test_gpu_hours_by_hand() -> None:
    assert gpu_hours(3600 * 989.4e12, "bf16", mfu=1.0) == pytest.approx(1)
    assert gpu_hours(3600 * 989.4e12, "auto", mfu=0.5) == pytest.approx(2)
    assert gpu_hours(3600 * 1978.9e12, "fp8") == pytest.approx(1 / MFU["fp8"])


def test_nvidias_own_measurement_is_met() -> None:
    """LLAMA3-8B at 14,451 tokens a second on each of 8 H100s in FP8 (NeMo 25.11 container): 19.2 hours a billion."""
    ledger = Ledger()
    ledger.charge("training", 10**9, LLAMA_8B, 8192, training=True)
    assert gpu_hours(training_flops(ledger), "fp8") == pytest.approx(1e9 / 14_451 / 3600, rel=0.05)


def test_a_layout_says_what_a_gpu_would_need_without_it() -> None:
    def gigabytes(layout: Parallelism) -> str:
        return f"{training_memory(LLAMA_8B, layout, TRAINING).total / 1e9:,.0f} GB of 80"

    alone = gigabytes(Parallelism(data_parallel=8))
    assert explain_layout(LLAMA_8B, Parallelism(context_parallel=2, data_parallel=8), TRAINING) == (
        f"CP 2, as without it a GPU would need {alone}"
    )
    both = Parallelism(tensor_parallel=2, sequence_parallel=True, data_parallel=8, recompute="selective")
    assert explain_layout(LLAMA_8B, both, TRAINING) == (
        f"TP 2, as without it a GPU would need {gigabytes(Parallelism(data_parallel=8, recompute='selective'))}; "
        "selective recomputation, as without it a GPU would need "
        f"{gigabytes(Parallelism(tensor_parallel=2, sequence_parallel=True, data_parallel=8))}"
    )
    unequal = Parallelism(pipeline_parallel=4, first_stage_layers=7, last_stage_layers=7, data_parallel=2)
    assert explain_layout(LLAMA_8B, unequal, TRAINING) == (
        f"PP 4, as without it a GPU would need {gigabytes(Parallelism(data_parallel=2))}"
    )
    small = LLAMA_8B.replace(layers=4)
    assert explain_layout(small, Parallelism(data_parallel=8), TRAINING).startswith("whole on each GPU (")


def test_every_cluster_recipe_fits() -> None:
    fullest = {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        if recipe.train.precision in MFU:
            fullest.update({f"{name} {one.name}": one.memory.total for one in dry_run(recipe).targets})
    assert len(fullest) > 20
    assert {name: needed for name, needed in fullest.items() if needed > _USABLE * H100_BYTES} == {}
