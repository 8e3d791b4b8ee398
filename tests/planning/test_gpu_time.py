"""GPU-hours and the reasons of layouts, by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_pvs.cli.dry_run_table import plan_hours
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.gpu_time import (
    MFU,
    USABLE_BYTES,
    explain_kernels,
    explain_layout,
    gpu_hours,
    peak_flops,
    training_flops,
)
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.planning.rounds import round_targets
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.recipe.training import Training
from tests.conftest import Outcome

LLAMA_8B = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False)
TRAINING = Training(
    tokens=1e9,
    sequence_length=8192,
    global_batch_size=128,
    learning_rate=1e-4,
    validation_samples=128,
    precision="bf16",
)


def test_gpu_hours_by_hand() -> None:
    assert gpu_hours(3600 * 989.4e12, "bf16", mfu=1.0) == pytest.approx(1)
    assert gpu_hours(3600 * 989.4e12, "auto", mfu=0.5) == pytest.approx(2)
    assert gpu_hours(3600 * 1978.9e12, "fp8") == pytest.approx(1 / MFU["fp8"])


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_of_a_device_is_that_of_its_name(device: str, expected: float | None) -> None:
    assert peak_flops(device, "bf16") == expected


def test_nvidias_own_measurement_is_met() -> None:
    """LLAMA3-8B at 14,451 tokens a second on each of 8 H100s in FP8 (NeMo 25.11 container): 19.2 hours a billion."""
    ledger = Ledger()
    ledger.charge("training", 10**9, LLAMA_8B, 8192, training=True)
    assert gpu_hours(training_flops(ledger), "fp8") == pytest.approx(1e9 / 14_451 / 3600, rel=0.05)


def _gigabytes(layout: Parallelism, shape: Shape = LLAMA_8B) -> str:
    return f"{training_memory(shape, layout, TRAINING).total / 1e9:,.0f} GB"


def test_a_layout_says_what_a_gpu_would_need_without_it() -> None:
    assert explain_layout(LLAMA_8B, Parallelism(context_parallel=2, data_parallel=16), TRAINING) == (
        f"CP 2, because without it a GPU would need {_gigabytes(Parallelism(data_parallel=16))} of the usable 72"
    )
    both = Parallelism(tensor_parallel=2, sequence_parallel=True, data_parallel=8, recompute="selective")
    whole, kept = Parallelism(data_parallel=8, recompute="selective"), both.model_copy(update={"recompute": "none"})
    assert explain_layout(LLAMA_8B, both, TRAINING) == (
        f"TP 2, because without it a GPU would need {_gigabytes(whole)} of the usable 72; selective recomputation, "
        f"the recipe's choice, although {_gigabytes(kept)} would fit without it"
    )
    unequal = Parallelism(pipeline_parallel=4, first_stage_layers=7, last_stage_layers=7, data_parallel=2)
    assert explain_layout(LLAMA_8B, unequal, TRAINING) == (
        f"PP 4, because without it a GPU would need {_gigabytes(Parallelism(data_parallel=2))} of the usable 72"
    )
    small = LLAMA_8B.replace(layers=4)
    two = Parallelism(data_parallel=8, micro_batch_size=2)
    assert explain_layout(small, two, TRAINING) == (
        f"whole on each GPU ({_gigabytes(two, small)} of the usable 72), so that only the optimizer communicates; "
        "2 sequences at once, because they fit: larger matrix products"
    )
    assert explain_layout(LLAMA_8B, two, TRAINING).startswith("does not fit: a GPU would need 1")


def test_only_what_applies_is_said_of_kernels() -> None:
    sharded = Parallelism(tensor_parallel=2, sequence_parallel=True)
    assert "TP" not in explain_kernels([Parallelism()], TRAINING)
    assert "TP overlaps" in explain_kernels([Parallelism(), sharded], TRAINING)
    assert "TP" not in explain_kernels([sharded], TRAINING.model_copy(update={"precision": "fp8"}))
    assert "except in distilled arms" in explain_kernels([sharded], load_recipe("minitron/llama31_4b").train)


def test_stages_need_what_the_first_of_them_does() -> None:
    """Adapt-Pruner's first stage removes a tenth of what it will; random arms have the final shape from the start."""
    recipe = load_recipe("adapt_pruner/llama31_8b")
    plan = dry_run(recipe)
    for planned in plan.targets:
        first = round_targets(planned.target, plan.parent)[0][1]
        assert planned.largest.shape == first
        assert planned.largest.memory == training_memory(first, planned.target.layout, recipe.train)
        assert (
            planned.largest.memory.total
            > training_memory(planned.expected.shape, planned.target.layout, recipe.train).total
        )
    random = dry_run(recipe.model_copy(update={"arms": ["random"]}))
    assert [planned.largest.shape for planned in random.targets] == [one.expected.shape for one in plan.targets]


@pytest.mark.parametrize(
    ("name", "tokens"), [("llama31_8b/sheared", 419_430_400), ("efficient_llm/llama31_8b", 4769 * 2**22)]
)
def test_what_trains_the_parent_first_is_planned_too(name: str, tokens: int) -> None:
    plan = dry_run(load_recipe(name))
    (learning,) = plan.learnings
    length = learning.placement.training.sequence_length
    assert learning.charge.flops == tokens * LLAMA_8B.flops_per_token(sequence_length=length, training=True)
    assert plan_hours(plan) == pytest.approx(
        gpu_hours(learning.charge.flops + sum(training_flops(one.ledger) for one in plan.arms), "bf16")
    )
    assert learning.placement.memory == training_memory(LLAMA_8B, learning.learned.layout, learning.learned.training)


def test_every_cluster_recipe_fits_and_says_why_its_layout_is_as_it_is() -> None:
    placements = {}
    for name in packaged_recipes():
        recipe = load_recipe(name)
        if recipe.train.precision in MFU:
            plan = dry_run(recipe)
            placements.update({f"{name} {one.name}": one.largest for one in plan.targets})
            placements.update({f"{name} masks of {one.name}": one.placement for one in plan.learnings})
    assert len(placements) > 25
    assert [name for name, placed in placements.items() if placed.memory.total > USABLE_BYTES] == []
    chosen = [
        name
        for name, placed in placements.items()
        if "the recipe's choice" in explain_layout(placed.shape, placed.layout, placed.training, placed.teacher)
    ]
    assert chosen == ["minitron/llama31_4b depth"], "its other target needs the layout, which both share"


def test_the_sum_of_the_grid_is_what_its_page_says(pvs: Callable[..., Outcome]) -> None:
    outcome = pvs("recipes", "llama31_8b")
    said = re.search(r"GPU-hours in total: ([\d,]+)", outcome.output)
    assert outcome.code == 0
    assert said
    assert f"{said[1]} GPU-hours" in (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
