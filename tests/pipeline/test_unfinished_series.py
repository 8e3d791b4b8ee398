"""A series whose recipe has changed since its last results: what is reported, and what is named as missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.pipeline import pipeline
from nemo_pvs.pipeline.series import RunSeries, compare_seeds
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.series import phases
from nemo_pvs.reporting.results import Results
from tests.recipe.test_series import CONFIG, TRAIN, grid_values, load


def _results(recipe: Recipe) -> Results:
    return Results(recipe.title, recipe.name, recipe.model_dump(), "2026-11-29", {}, {}, None, [])


def test_results_of_another_recipe_are_not_those_of_a_seed(tmp_path: Path) -> None:
    """A seed that has not begun with the changed recipe still has its results of the one before."""
    before = load(tmp_path, {**grid_values(), "seeds": [1, 2]})
    values = grid_values()
    values["targets"]["narrow"] = values["targets"].pop("width")
    members = phases(load(tmp_path, {**values, "seeds": [1, 2]}), tmp_path / "run")[-1]
    for member, was in zip(members, phases(before, tmp_path / "run")[-1], strict=True):
        member.folder.mkdir(parents=True)
        _results(member.recipe if member is members[0] else was.recipe).save(member.folder / "results.json")
    runs = compare_seeds(members)
    assert [run.seed for run in runs.runs] == [1]
    assert runs.absent == (str(members[1].folder),)


def test_a_rate_that_was_added_to_a_sweep_is_not_tried_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**grid_values(), "parent": {"source": "no", "config": CONFIG}, "budgets": [128]}
    values["evaluate"] = {"sequence_length": 16}
    values["train"] = {**TRAIN, "learning_rate": {"sweep": [1e-3, 1e-2, 1e-1]}}
    recipe = load(tmp_path, values)
    (sweep,), _ = phases(recipe, tmp_path / "run")
    sweep.folder.mkdir(parents=True)
    _results(sweep.recipe).save(sweep.folder / "results.json")
    monkeypatch.setattr(pipeline, "is_finished", lambda job: "0.1" not in job.name)
    with pytest.raises(UserError, match=r"The sweep in .*run/sweep is not finished; continue pvs run first\."):
        RunSeries(recipe, tmp_path / "run").run_so_far()


def test_the_folder_of_several_seeds_has_their_recipe(tmp_path: Path) -> None:
    values = {**grid_values(), "parent": {"source": "no", "config": CONFIG}, "budgets": [128], "seeds": [1, 2]}
    recipe = load(tmp_path, values)
    with pytest.raises(UserError, match="is finished yet"):
        RunSeries(recipe, tmp_path / "run").run_so_far()
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
