"""Which runs a recipe stands for: parents that it trains first, learning rates to choose, and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.series import candidates, phases, swept_kinds, with_rates

DATA = {"token_files": dict.fromkeys(("train", "validation", "calibration", "test"), "tokens/all")}
TRAIN = {"sequence_length": 16, "global_batch_size": 4, "validation_samples": 4, "learning_rate": 1e-3, "seed": 7}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
RUN = Path("runs/grid")


def parent_values() -> dict[str, Any]:
    return {
        "name": "p",
        "title": "The parent",
        "parent": {"config": CONFIG, "tokenizer": "tokenizer"},
        "data": DATA,
        "targets": {"parent": {"method": "dense"}},
        "arms": ["random"],
        "budgets": [640],
        "train": TRAIN,
    }


def grid_values() -> dict[str, Any]:
    return {
        "name": "grid",
        "title": "The grid",
        "parent": {"recipe": "parent.yaml"},
        "data": DATA,
        "targets": {
            "width": {"method": "minitron-width", "ffn": 48},
            "depth": {"method": "minitron-depth", "layers": 2},
            "sparse": {"method": "wanda", "sparsity": 0.5},
        },
        "calibrate": {"samples": 4, "sequence_length": 16},
        "budgets": {"pruned": [128, 256], "random": [128, "equal-total-tokens"]},
        "train": TRAIN,
    }


def load(folder: Path, grid: dict[str, Any], parent: dict[str, Any] | None = None) -> Recipe:
    (folder / "parent.yaml").write_text(yaml.safe_dump(parent or parent_values()))
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return load_recipe(folder / "grid.yaml")


def test_a_plain_recipe_is_one_run_in_its_own_folder() -> None:
    recipe = load_recipe("smollm2_135m/demo")
    ((member,),) = phases(recipe, RUN)
    assert (member.recipe, member.folder, member.sweep) == (recipe, RUN, None)


def test_the_parent_comes_first_and_is_the_source(tmp_path: Path) -> None:
    recipe = load(tmp_path, grid_values())
    (parent,), (run,) = phases(recipe, RUN)
    assert parent.recipe == load_recipe(tmp_path / "parent.yaml")
    assert parent.folder.parent == Path("runs/parents")
    assert run.folder == RUN
    assert run.recipe.parent.source == str(parent.folder / "models" / "parent-random-640")
    # What a dry run needs to know before the parent exists.
    assert (recipe.parent.config, recipe.parent_tokens) == (CONFIG, 640)


def test_every_seed_has_its_parent_its_folder_and_its_order(tmp_path: Path) -> None:
    recipe = load(tmp_path, {**grid_values(), "seeds": [1, 2]})
    parents, runs = phases(recipe, RUN)
    assert [member.folder for member in runs] == [RUN / "seed-1", RUN / "seed-2"]
    for seed, parent, run in zip((1, 2), parents, runs, strict=True):
        assert parent.recipe.train.seed == run.recipe.train.seed == seed
        assert parent.recipe.train.order_seed == run.recipe.train.order_seed == seed
        assert run.recipe.parent.source == str(parent.folder / "models" / "parent-random-640")
    assert parents[0].folder != parents[1].folder


def test_a_data_seed_is_kept_for_all_seeds(tmp_path: Path) -> None:
    recipe = load(tmp_path, {**grid_values(), "seeds": [1, 7], "train": {**TRAIN, "data_seed": 7}})
    runs = phases(recipe, RUN)[-1]
    assert [member.recipe.train.order_seed for member in runs] == [7, 7]
    # The second is told apart as a plain recipe with seed 7 is, whose data_seed says nothing new.
    assert "data_seed" not in runs[1].recipe.train.identity


def test_recipes_that_need_the_same_parent_share_it(tmp_path: Path) -> None:
    def parent_folder(parent: dict[str, Any]) -> Path:
        return phases(load(tmp_path, grid_values(), parent), RUN)[0][0].folder

    folder = parent_folder(parent_values())
    assert parent_folder({**parent_values(), "title": "Another", "evaluate": {"samples": 1}}) == folder
    assert parent_folder({**parent_values(), "layout": {"tensor_parallel": 2}}) == folder
    assert parent_folder({**parent_values(), "seeds": [7]} | {"seeds": None}) == folder
    for change in ({"budgets": [704]}, {"train": {**TRAIN, "seed": 8}}, {"train": {**TRAIN, "learning_rate": 2e-3}}):
        assert parent_folder({**parent_values(), **change}) != folder


def test_one_rate_is_chosen_per_kind_of_arm(tmp_path: Path) -> None:
    grid = grid_values()
    grid["train"] = {**TRAIN, "learning_rate": {"sweep": [1e-3, 1e-2]}}
    grid["targets"]["depth"]["learning_rate"] = 5e-3
    grid["targets"]["sparse"]["learning_rate"] = {"pruned": {"sweep": [1e-4, 1e-3], "tokens": 256}, "random": 2e-3}
    recipe = load(tmp_path, grid)
    assert [(kind.name, kind.targets) for kind in swept_kinds(recipe)] == [
        ("pruned", ("width",)),
        ("random", ("width",)),
        ("sparse pruned", ("sparse",)),
    ]
    _, (sweep,), (run,) = phases(recipe, RUN)
    assert (sweep.folder, run.sweep) == (RUN / "sweep", RUN / "sweep")
    trained = [(arm.name, arm.training.peak_learning_rate, arm.tokens) for arm in sweep.recipe.runs]
    assert trained == [
        ("width-pruned-0.001-pruned-256", 1e-3, 256),
        ("width-pruned-0.01-pruned-256", 1e-2, 256),
        ("width-random-0.001-random-128", 1e-3, 128),
        ("width-random-0.01-random-128", 1e-2, 128),
        ("sparse-pruned-0.0001-pruned-256", 1e-4, 256),
        ("sparse-pruned-0.001-pruned-256", 1e-3, 256),
    ]
    chosen = with_rates(recipe, [1e-2, 1e-3, 1e-4])
    assert not swept_kinds(chosen)
    rates = {
        arm.name: arm.training.peak_learning_rate for arm in chosen.settled(dict.fromkeys(_matched(chosen), 64)).runs
    }
    assert {rates[name] for name in rates if name.startswith("width-pruned")} == {1e-2}
    assert {rates[name] for name in rates if name.startswith("width-random")} == {1e-3}
    assert {rates[name] for name in rates if name.startswith("depth")} == {5e-3}
    assert {rates[name] for name in rates if name.startswith("sparse-pruned")} == {1e-4}
    assert {rates[name] for name in rates if name.startswith("sparse-random")} == {2e-3}


def _matched(recipe: Recipe) -> list[str]:
    return [name for target in recipe.targets for name, _, _ in recipe.matched_runs(target)]


def test_rates_by_initial_weights_hold_for_all_targets_and_can_be_swept(tmp_path: Path) -> None:
    grid = grid_values()
    grid["train"] = {**TRAIN, "learning_rate": {"pruned": 1e-4, "random": 2e-3}}
    grid["targets"]["depth"]["learning_rate"] = 5e-3
    grid["budgets"] = [64]
    rates = {arm.name: arm.training.learning_rate for arm in load(tmp_path, grid).runs}
    assert {rate for name, rate in rates.items() if name.startswith("depth")} == {5e-3}
    assert {rate for name, rate in rates.items() if name.startswith(("width-pruned", "sparse-pruned"))} == {1e-4}
    assert {rate for name, rate in rates.items() if name.startswith(("width-random", "sparse-random"))} == {2e-3}
    grid["train"]["learning_rate"] = {"pruned": {"sweep": [1e-4, 1e-3]}, "random": 2e-3}
    recipe = load(tmp_path, grid)
    assert [(kind.name, kind.targets) for kind in swept_kinds(recipe)] == [
        ("pruned", ("width",)),
        ("sparse pruned", ("sparse",)),
    ]
    chosen = with_rates(recipe, [1e-4, 1e-3])
    rates = {arm.name: arm.training.learning_rate for arm in chosen.runs}
    assert {rate for name, rate in rates.items() if name.startswith("width-pruned")} == {1e-4}
    assert {rate for name, rate in rates.items() if name.startswith("sparse-pruned")} == {1e-3}
    assert {rate for name, rate in rates.items() if name.startswith(("width-random", "sparse-random"))} == {2e-3}
    assert chosen.train.peak_learning_rate == 1e-4


def test_equal_sweeps_of_several_targets_are_one_choice(tmp_path: Path) -> None:
    grid = grid_values()
    for name in ("width", "depth"):
        grid["targets"][name]["learning_rate"] = {"sweep": [1e-3, 1e-2]}
    recipe = load(tmp_path, grid)
    assert [(kind.name, kind.targets) for kind in swept_kinds(recipe)] == [
        ("pruned", ("width", "depth")),
        ("random", ("width", "depth")),
    ]
    assert list(candidates(recipe).targets) == [
        f"width-{start}-{rate}" for start in ("pruned", "random") for rate in ("0.001", "0.01")
    ]


@pytest.mark.parametrize(
    ("grid", "parent", "sentence"),
    [
        ({"seeds": [1, 1]}, {}, "recipe: seeds lists 1 twice; remove one."),
        ({"seeds": []}, {}, "seeds: list should have at least 1 item"),
        ({"seeds": [0]}, {}, "seeds.0: input should be greater than or equal to 1, not 0."),
        ({"parent": {"recipe": "no.yaml"}}, {}, "no.yaml does not exist; correct the path."),
        ({"parent": {"recipe": "parent.yaml", "source": "x"}}, {}, "both a source and a recipe, which trains it"),
        ({}, {"budgets": [64, 128]}, "trains 2 models; name a recipe that trains one."),
        ({}, {"seeds": [1, 2]}, "has seeds, so there are several parents; add the seeds here too."),
        (
            {},
            {"parent": {"source": "x"}},
            "has a parent itself; name a recipe that trains a model from random weights.",
        ),
        ({"parent": {"recipe": {"name": "inline"}}}, {}, "parent.recipe: title is missing; add it."),
        ({"parent": {"recipe": {**parent_values(), "budgets": [64, 128]}}}, {}, "parent.recipe trains 2 models;"),
        ({"train": {**TRAIN, "learning_rate": {"sweep": [1e-3]}}}, {}, "train.learning_rate.sweep: list should have"),
        (
            {"train": {**TRAIN, "learning_rate": {"sweep": [1e-3, 1e-3]}}},
            {},
            "train.learning_rate: a rate is given twice; leave one out.",
        ),
        (
            {"train": {**TRAIN, "learning_rate": {"sweep": [1e-3, 1.0000001e-3]}}},
            {},
            "train.learning_rate: a rate is given twice; leave one out.",
        ),
        ({"train": {**TRAIN, "learning_rate": {"swep": [1e-3, 1e-2]}}}, {}, "unknown key train.learning_rate.swep"),
        (
            {"train": {**TRAIN, "learning_rate": -1}},
            {},
            "train.learning_rate: input should be greater than 0, not -1.",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(
    tmp_path: Path, grid: dict[str, Any], parent: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, {**grid_values(), **grid}, {**parent_values(), **parent})
    assert sentence in str(error.value)


def test_a_parents_recipe_can_be_given_in_place(tmp_path: Path) -> None:
    grid = {**grid_values(), "parent": {"recipe": parent_values()}}
    assert phases(load(tmp_path, grid), RUN)[0] == phases(load(tmp_path, grid_values()), RUN)[0]


def test_arms_that_are_not_trained_need_no_rate(tmp_path: Path) -> None:
    grid = {**grid_values(), "budgets": {"random": [128]}}
    grid["train"] = {**TRAIN, "learning_rate": {"sweep": [1e-3, 1e-2]}}
    assert {kind.initialisation for kind in swept_kinds(load(tmp_path, grid))} == {"random"}


def test_a_sweep_stays_in_its_range(tmp_path: Path) -> None:
    grid = grid_values()
    grid["data"] = {**DATA, "token_ranges": {"pruned": [640, 1000]}}
    grid["train"] = {**TRAIN, "learning_rate": {"sweep": [1e-3, 1e-2], "tokens": 512}}
    with pytest.raises(UserError, match=r"sweep of pruned arms reads 512 tokens, .*\(640 to 1,000\)"):
        phases(load(tmp_path, grid), RUN)


def test_sweeps_of_one_kind_with_different_tokens_are_refused(tmp_path: Path) -> None:
    grid = grid_values()
    grid["targets"]["width"]["learning_rate"] = {"sweep": [1e-3, 1e-2], "tokens": 64}
    grid["targets"]["sparse"]["learning_rate"] = {"sweep": [1e-3, 1e-2], "tokens": 128}
    with pytest.raises(UserError, match="the sweeps of pruned arms have different tokens; give all of them the same"):
        phases(load(tmp_path, grid), RUN)


def test_a_sweep_counts_tokens_as_the_recipe_does(tmp_path: Path) -> None:
    """The paper's label of 61,035 tokens stands for 64,000, which are not scaled again and stay in their range."""
    grid = grid_values()
    grid["train"] = {**TRAIN, "paper_steps": True, "learning_rate": {"sweep": [1e-3, 1e-2]}}
    grid["budgets"] = {"pruned": [61_035], "random": ["equal-training-tokens"]}
    _, (sweep,), (run,) = phases(load(tmp_path, grid), RUN)
    (pruned,) = run.recipe.pruned_runs("width")
    assert pruned.tokens == 64_000
    assert {arm.tokens for arm in sweep.recipe.runs} == {64_000}
    grid["data"] = {**DATA, "token_ranges": {"pruned": [0, 64_000], "random": [0, 63_000]}}
    with pytest.raises(UserError, match=r"sweep of random arms reads 64,000 tokens, .*\(0 to 63,000\)"):
        phases(load(tmp_path, grid), RUN)
