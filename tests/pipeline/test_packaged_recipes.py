"""Every packaged recipe runs to its end in miniature: all that it says, but with a tiny parent, text and schedule.

A dry run does not know what pruning leaves, whether a class can load it, and what the stages after it make of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.data.tokenize import write_token_file
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.pruning.presets import find_preset
from nemo_pvs.recipe.load import load_recipe, packaged_recipes, parse_recipe
from nemo_pvs.training import trainer
from tests.families import save_tiny, tiny_config
from tests.megatron.launcher import ForkedLauncher

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

SEQUENCE, BATCH = 32, 4
STEP = SEQUENCE * BATCH
TOKENS = 16384
"""What stands for the largest range of tokens of a recipe."""
RECIPES = [name for name in packaged_recipes() if not name.startswith(("paper_in_small/", "smollm2_135m/"))]
"""Those for clusters; the others have been run as they are, and documents show what came out."""


FEW = ("adapt_pruner/qwen25_0p5b", "llama32_1b/compare", "minitron/llama31_4b", "sheared_llama/llama2_7b")
"""The recipes of ``make test``: rounds in a family with biases, sparse models, a teacher, domains. ``make test-full``
runs all."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("name", RECIPES if metafunc.config.getoption("full") else FEW)


def test_it_runs_to_its_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(miniature(load_recipe(name).model_dump(), tmp_path), name)
    monkeypatch.setattr(trainer, "_launch", ForkedLauncher)
    pipeline = Pipeline(recipe, tmp_path / "run")
    pipeline.run()
    arms = assemble(pipeline).arms
    assert [len(arm.validation) for arm in arms] == [3] * len(recipe.runs), "before training, half-way, after it"


def miniature(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe's values with a tiny parent, text and schedule; what is written of them is in ``folder``.

    Of several targets the first and the last remain, and one budget of each kind of arm.
    """
    large, tiny = _make_parent(values, folder)
    train, longest = values["train"], _longest(values)

    def position(token: float | None) -> int | None:
        return None if token is None else round(token / longest * TOKENS)

    _make_data(values, folder)
    ranges = values["data"]["token_ranges"]
    for kind in ("parent", "pruned", "random"):
        ranges[kind] = ranges[kind] and [position(end) for end in ranges[kind]]
    values["calibrate"] |= {"samples": 4, "sequence_length": SEQUENCE, "scan_samples": 2}
    values["evaluate"] |= {"samples": 4, "sequence_length": SEQUENCE, "tasks": []}
    train |= {
        "sequence_length": SEQUENCE,
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH // 2,
        "precision": "fp32",
        "validations": 2,
        "validation_samples": 4,
    }
    values["budgets"] = _budgets(values["budgets"])
    values["train"]["tokens"] = 8 * STEP
    values["layout"] = {}
    names = list(values["targets"])
    values["targets"] = {name: values["targets"][name] for name in (names[0], names[-1])}
    for target in values["targets"].values():
        _shrink(target, large, tiny, position)
    return values


def _make_parent(values: dict[str, Any], folder: Path) -> tuple[Shape, Shape]:
    """Save a tiny parent of the recipe's family, let the recipe name it, and return both shapes."""
    parent = values["parent"]
    layout = Layout.for_config(parent["config"])
    large = layout.shape(parent["config"])
    groups = min(8, large.kv_groups)
    settings = {
        "num_hidden_layers": 8,
        "num_attention_heads": groups * min(2, large.heads_per_group),
        "num_key_value_heads": groups,
        "tie_word_embeddings": large.tied,
    }
    path = save_tiny(folder / "parent", layout.family, **settings)
    parent |= {"pretraining_tokens": parent.get("pretraining_tokens") and 8 * STEP}
    if parent["source"]:
        parent |= {"source": str(path), "config": None}
    else:
        config = tiny_config(layout.family, **settings).to_dict()
        parent |= {"config": config, "tokenizer": str(path)}
    distill = values["train"].get("distill")
    if distill and distill["teacher"] != "parent":
        distill["teacher"] = str(path)
    return large, layout.shape(tiny_config(layout.family, **settings).to_dict())


def _make_data(values: dict[str, Any], folder: Path) -> None:
    """Write text or token files, and let the recipe name them."""
    draw = random.Random(0)
    words = [draw.randint(2, 127) for _ in range(61)]
    documents = [[*words[index % 61 :], *words] for index in range(4 * TOKENS // 90)]
    data = values["data"]
    if data["token_files"]:
        write_token_file(folder / "tokens", documents, 128)
        files = data["token_files"]
        data["token_files"] = {
            name: dict.fromkeys(one, str(folder / "tokens")) if isinstance(one, dict) else str(folder / "tokens")
            for name, one in files.items()
        }
    else:
        lines = [json.dumps({"text": " ".join(f"w{token}" for token in document)}) for document in documents]
        (folder / "corpus.jsonl").write_text("\n".join(dict.fromkeys(lines)))
        data["source"] = str(folder / "corpus.jsonl")
        data["split"] = {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}


def _longest(values: dict[str, Any]) -> float:
    ranges = values["data"]["token_ranges"]
    return max([ends[1] for ends in (ranges["parent"], ranges["pruned"], ranges["random"]) if ends], default=1e12)


def _budgets(budgets: Any) -> Any:
    """Return budgets of 4 steps for numbers; what makes arms equal, such as ``equal-total-tokens``, remains."""
    if isinstance(budgets, dict):
        return {arm: _budgets(given) for arm, given in budgets.items()}
    if budgets is None:
        return None
    return [*dict.fromkeys(budget if isinstance(budget, str) else 4 * STEP for budget in budgets)]


def _shrink(target: dict[str, Any], large: Shape, tiny: Shape, position: Callable[[float | None], int | None]) -> None:
    """Let a target say the same of the tiny parent as it says of the large one."""
    if target.get("preset"):
        wanted = find_preset(target.pop("preset"), large).target
        names = ("layers", "hidden", "ffn", "kv_groups")
        target |= {name: getattr(wanted, name) for name in names if getattr(wanted, name) != getattr(large, name)}
    for name in ("layers", "hidden", "ffn", "kv_groups", "heads"):
        if target.get(name):
            target[name] = max(1, round(target[name] / getattr(large, name) * getattr(tiny, name)))
    for name in ("ffn_multiple", "kv_groups_multiple", "remove_groups", "protect_first", "protect_last"):
        if target.get(name):
            target[name] = 1
    if target.get("stages"):
        target["stages"] = min(2, target["stages"])
    if target.get("iterations"):
        target["iterations"] = 4
    target["layout"] = {}
    short = {"tokens": 8 * STEP, "layout": None}
    if learn := target.get("learn"):
        # Two hundred steps are enough at these rates; those of the recipe are for thousands.
        learn |= {**short, "tokens": 200 * STEP, "mask_learning_rate": 1.0, "multiplier_learning_rate": 10.0}
        learn |= {"global_batch_size": BATCH, "micro_batch_size": None, "validations": 2}
        learn["first_token"] = position(learn["first_token"])
    if aware := target.get("pruning_aware"):
        removed = 1 - aware["parameters"] / large.parameters
        aware |= {**short, "start_tokens": 2 * STEP, "parameters": round(tiny.parameters * (1 - removed / 40))}
        aware |= {"ffn_at_once": 1, "hidden_at_once": 1, "compensation_tokens": STEP}  # few units in few steps
        aware["first_token"] = position(aware["first_token"])
