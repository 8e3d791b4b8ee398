"""Names under NeMo's own command: one a recipe, its runs as arguments. Without NeMo."""

from __future__ import annotations

import re

import pytest

from nemo_pvs.cli.factory_names import choose_arm, factory_call, factory_name
from nemo_pvs.errors import UserError
from nemo_pvs.planning.dry_run import settled
from nemo_pvs.recipe.load import load_recipe, packaged_recipes


def test_names_are_few_different_and_what_nemo_run_takes():
    names = [factory_name(recipe) for recipe in packaged_recipes()]
    assert len(names) == len(set(names)) < 50
    assert all(re.fullmatch(r"\w+", name) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_recipes())
def test_every_run_of_a_recipe_can_be_written(name):
    recipe = settled(load_recipe(name))
    for arm in recipe.runs:
        called, arguments = re.fullmatch(r"(\w+)(?:\((.*)\))?", factory_call(name, recipe, arm)).groups()
        values = dict(pair.split("=") for pair in (arguments or "").split(",") if pair)
        values["tokens"] = float(values.get("tokens", 0))
        assert called == factory_name(name)
        assert choose_arm(recipe, **values) == arm


def test_what_is_left_out_and_what_must_be_said():
    recipe = settled(load_recipe("llama31_8b/minitron_width"))
    assert choose_arm(recipe, "4b-width", tokens=50e9).name == "4b-width-pruned-50B"
    steps = -(-50_000_000_000 // (512 * 8192))
    assert choose_arm(recipe, "4b-width", "random", steps * 512 * 8192).name == "4b-width-random-50B"
    assert choose_arm(load_recipe("llama31_8b/p200")).name == "p200-random-200B"
    with pytest.raises(
        UserError, match=r"has 5 matching runs; .*target=4b-width, init=pruned, tokens=10e9 or 30e9 or"
    ):
        choose_arm(recipe, "4b-width")
    for wrong in ({"target": "4b"}, {"init": "trained"}, {"target": "4b-width", "tokens": 51e9}):
        with pytest.raises(UserError, match=r"has no matching runs; .*target=4b-width or .*init=pruned or random"):
            choose_arm(recipe, **wrong)
