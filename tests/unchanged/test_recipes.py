"""The packaged recipes: what they set, what their records are told apart by, and what they would do."""

from __future__ import annotations

import re

import pytest
import yaml

from nemo_pvs.planning.dry_run import settled
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.system.files import sha256_json
from tests.unchanged.conftest import GOLDEN

RECIPES = (GOLDEN / "recipes" / "names.txt").read_text().split()


@pytest.fixture(autouse=True)
def _nothing_is_here(tmp_path, monkeypatch):
    """No parent and no token file lies where recipes look for them, so that every machine answers alike."""
    monkeypatch.chdir(tmp_path)


def test_every_recipe_is_still_there():
    assert set(RECIPES) <= set(packaged_recipes())


@pytest.mark.parametrize("name", RECIPES)
def test_settings(name, golden):
    """All keys with their defaults, as a run folder keeps them, and what the records of its stages are made from.

    The titles have been reworded since.
    """
    recorded = yaml.safe_load((GOLDEN / "recipes" / f"{name}.yaml").read_text())
    recipe = settled(load_recipe(name)).model_copy(update={"title": recorded["recipe"]["title"]})
    settings = {
        "settings hash": sha256_json(recipe.model_dump()),
        "options of targets": {key: target.options for key, target in recipe.targets.items()},
        "identities of trainings": {arm.name: sha256_json(arm.training.identity) for arm in recipe.runs},
        "recipe": recipe.model_dump(),
    }
    golden(f"recipes/{name}.yaml", yaml.safe_dump(settings, width=119))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_dry_run(name, pvs, golden):
    """All that is printed but the title, which has been reworded, and whether this machine has a GPU."""
    code, output, errors = pvs("run", name, "--dry-run")
    title, _, _ = (GOLDEN / "recipes" / f"{name}.txt").read_text().partition("\n")
    assert output.startswith(load_recipe(name).title)
    output = output.replace(load_recipe(name).title, title, 1)
    output = re.sub("(?m)^where: this machine's .*$", "where: this machine", output)
    golden(f"recipes/{name}.txt", f"{output}{errors}exit code {code}\n")
