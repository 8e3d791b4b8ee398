from __future__ import annotations

import pytest

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.pruning.presets import target_presets
from nemo_pvs.reporting.published import published

PER_STEP = 512 * 8192


def test_the_points_are_those_of_figure_1() -> None:
    losses = {
        (curve.method, curve.initialisation): [point.loss for point in curve.points] for curve in published().curves
    }
    assert losses == {
        ("minitron-depth", "pruned"): [2.70, 2.59, 2.54, 2.46, 2.43],
        ("minitron-depth", "random"): [3.09, 2.81, 2.64, 2.49, 2.47],
        ("minitron-width", "pruned"): [2.62, 2.47, 2.47, 2.39, 2.35],
        ("minitron-width", "random"): [3.11, 2.80, 2.70, 2.46, 2.44],
    }
    gaps = [losses["minitron-width", "random"][i] - losses["minitron-width", "pruned"][i] for i in range(5)]
    assert gaps == [pytest.approx(gap) for gap in (0.49, 0.33, 0.23, 0.07, 0.09)]


def test_the_labels_are_4_86_percent_short_of_the_tokens() -> None:
    labels = [10, 30, 50, 250, 500]
    for curve in published().curves:
        assert [point.step for point in curve.points] == [round(label * 1e9 / 4e6) for label in labels]
        for label, point in zip(labels, curve.points, strict=True):
            assert point.tokens == point.step * PER_STEP
            assert point.tokens / (label * 1e9) == pytest.approx(1.0486, abs=1e-4)
    assert published().parent_tokens == 50_000 * PER_STEP
    assert published().accuracy_tokens == 12_500 * PER_STEP


def test_the_sizes_are_those_of_the_presets() -> None:
    sizes = {preset.name: preset.parameters for preset in target_presets().values()}
    depth, _, width, _ = published().curves
    assert (depth.parameters, width.parameters) == (sizes["llama31_8b/4b-depth"], sizes["llama31_8b/4b-width"])
    assert published().parent_parameters == target_presets()["llama31_8b/4b-depth"].parent.parameters
    smallest = min(one.parameters for one in published().advantages)
    assert smallest == sizes["llama31_8b/1.5b-depth"]


def test_differences_of_accuracy_are_those_that_were_published() -> None:
    found = {one.method: round(one.random - one.pruned, 1) for one in published().accuracies}
    assert found == {
        "minitron-depth": 1.8,
        "sheared-llama": -0.6,
        "flap": -1.4,
        "sparsegpt 2:4": 0.4,
        "sparsegpt": -1.2,
        "wanda": -0.9,
    }


def test_every_point_names_its_source() -> None:
    paper = published()
    for one in (*paper.curves, *paper.accuracies, *paper.advantages, *paper.perplexities):
        assert one.source.startswith("arXiv 2606.14150, ")


def test_the_ledger_of_a_published_run_has_its_steps() -> None:
    preset = target_presets()["llama31_8b/4b-depth"]
    ledger = Ledger()
    ledger.charge(
        "training", published().accuracy_tokens, preset.target, 8192, training=True, tokens_per_step=PER_STEP
    )
    assert ledger.charges[0].steps == 12_500
