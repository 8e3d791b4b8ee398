"""The paper's grid in miniature: P200 and every recipe beside it, as shipped but for their sizes, to the reports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_pvs.data.shards import tokenize_files
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.html import html_report, write_report
from nemo_pvs.reporting.results import Results
from nemo_pvs.training.trainer import Trainer
from tests.conftest import save_tiny_tokenizer, tiny_llama_config
from tests.pipeline.test_pipeline import tiny_values

RECIPES = Path(__file__).parents[2] / "recipes" / "llama31_8b"
STEP = 4 * 32
BUDGET = 2 * STEP - 5
"""No whole number of steps, as 200e9 tokens are none of 4,194,304."""

TARGETS: dict[str, dict[str, Any]] = {
    "flap": {"4b-flap": {"remove_groups": 1, "ffn_multiple": 8}},
    "minitron_depth": {"4b-depth": {"preset": None, "layers": 3}},
    "minitron_width": {"4b-width": {"preset": None, "hidden": 48, "ffn": 64}},
    "sheared": {
        "4b-shear": {
            "preset": None,
            "ffn": 94,  # so near that two steps of learning masks come to it
            "learn": {"tokens": 2 * STEP, "first_token": 4 * BUDGET, "global_batch_size": 4, "layout": None},
        }
    },
    "sparsegpt": {"sparsegpt-2-4": {}},
    "wanda": {"wanda-unstructured": {}},
}
"""Of every file a target, as small as it can be."""


def test_the_grid_is_all_here() -> None:
    names = {name.split("/")[1] for name in packaged_recipes() if name.startswith("llama31_8b/")}
    assert names == {"p200", *TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_a_parent_of_ours_is_not_declared(name: str) -> None:
    """Its ledger will count it; until then a dry run takes the whole steps that P200 is trained for."""
    p200, recipe = dry_run(load_recipe("llama31_8b/p200")), load_recipe(f"llama31_8b/{name}")
    (parent,) = p200.arms
    assert recipe.parent.source == f"runs/{p200.recipe.name}/models/{parent.arm.name}"
    assert recipe.parent.pretraining_tokens == 0
    assert recipe.parent_tokens == parent.arm.tokens == 200_001_191_936
    pruned = next(arm for arm in dry_run(recipe).arms if arm.arm.takes_parent)
    assert pruned.ledger.charges[0].tokens == parent.arm.tokens
    assert pruned.arm.first_token == parent.arm.tokens


@pytest.fixture(name="trainer")
def trainer_fixture(tmp_path: Path, forked_launcher: None) -> Iterator[Trainer]:
    """Return what trains every arm of every file."""
    with Trainer(tmp_path / "trainer" / "launcher.log") as trainer:
        yield trainer


def _in_miniature(name: str, folder: Path, targets: dict[str, Any]) -> Path:
    """Write a recipe that extends a shipped one and changes its sizes, and where things lie."""
    shipped = load_recipe(f"llama31_8b/{name}")
    gone = {target: None for target in shipped.targets if target not in targets}
    config = tiny_llama_config(rope_theta=500000.0).to_dict()
    files = {split: str(folder / "tokens" / split) for split in ("train", "validation", "calibration", "test")}
    sizes = {
        "extends": str(RECIPES / f"{name}.yaml"),
        "parent": {"config": {key: config[key] for key in shipped.parent.config or {}}},
        "data": {
            "token_files": files,
            "token_ranges": {"parent": [0, BUDGET], "pruned": [BUDGET, 4 * BUDGET], "random": [0, 4 * BUDGET]},
        },
        "calibrate": {"samples": 4, "sequence_length": 32},
        "targets": {**gone, **targets},
        "budgets": [BUDGET],
        "layout": None,
        "train": {
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 4,
            "validations": 1,
            "validation_samples": 4,
            "checkpoints": 1,
            "precision": "fp32",
        },
        "evaluate": {"samples": 2, "sequence_length": 32},
    }
    if name == "p200":
        sizes["parent"]["tokenizer"] = str(folder / "tokenizer")
    else:
        sizes["parent"]["source"] = str(folder / "p200" / "models" / f"p200-random-{BUDGET}")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sizes))
    return path


def _run(name: str, folder: Path, trainer: Trainer, targets: dict[str, Any]) -> Results:
    pipeline = Pipeline(load_recipe(str(_in_miniature(name, folder, targets))), folder / name)
    pipeline.run(trainer)
    results = assemble(pipeline)
    write_report(results, folder / name)
    return results


@pytest.mark.parallel
@pytest.mark.slow
def test_from_p200_to_every_report(tmp_path: Path, trainer: Trainer) -> None:
    corpus = tiny_values(tmp_path)["data"]["source"]
    tokenizer = save_tiny_tokenizer(tmp_path / "tokenizer")
    split = {"train": 0.4, "validation": 0.2, "calibration": 0.2, "test": 0.2}
    tokenize_files([corpus], tokenizer, tmp_path / "tokens", split)

    p200 = _run("p200", tmp_path, trainer, {"p200": {}})
    assert p200.parent is None
    (parent,) = p200.arms
    assert parent.ledger.training.tokens == 2 * STEP
    assert "Trained from random weights: p200, random, 251 ended at" in (tmp_path / "p200" / "report.md").read_text()

    for name, targets in TARGETS.items():
        results = _run(name, tmp_path, trainer, targets)
        assert [arm.initialisation for arm in results.arms] == ["pruned", "random"] * len(targets)
        for arm in results.arms:
            assert arm.ledger.training.tokens == 2 * STEP
            assert results.gap(arm) is not None or arm.initialisation == "random"
        for pruned in results.arms[::2]:
            assert pruned.ledger.charges[0].activity == "parent pretraining"
            assert pruned.ledger.charges[0].tokens == 2 * STEP, "the parent's own ledger counts"
            ranges = [(read.first, read.end) for read in pruned.ledger.read]
            assert ranges[0] == (0, 2 * STEP)
            assert ranges[-1] == (2 * STEP, 4 * STEP), "the parent's text was read again"
            assert len(ranges) == (3 if name == "sheared" else 2)
        model = tmp_path / name / "models" / f"{next(iter(targets))}-pruned-{BUDGET}"
        assert Ledger.load(model / LEDGER) == results.arms[0].ledger
        assert "<svg" in (tmp_path / name / "report.html").read_text()
    together = compare(read_runs([str(tmp_path / name) for name in TARGETS]))
    assert len(together.results.arms) == 2 * sum(map(len, TARGETS.values()))
    assert "<svg" in html_report(together)
