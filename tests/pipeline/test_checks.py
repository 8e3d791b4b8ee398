"""A run that cannot come to its end is refused before any work, not after days of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_files import token_file_hash
from nemo_pvs.data.tokenize import write_token_file
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.recipe.load import parse_recipe
from tests.pipeline.test_pipeline import _token_files, tiny_values

STEP = 4 * 32
"""Tokens of a step of ``tiny_values``."""


@pytest.fixture(name="values")
def values_fixture(tmp_path: Path) -> dict:
    """Return a recipe for token files and a parent with no declared tokens."""
    values = _token_files(tiny_values(tmp_path), tmp_path / "tokens")
    values["train"]["tokens"] = 512
    del values["parent"]["pretraining_tokens"]
    return values


def _train_parent(values: dict, steps: int, **read: object) -> TokensRead:
    """Give the parent the ledger of a training on the first steps of the run's own data, in the usual order."""
    parent, file = Path(values["parent"]["source"]), token_file_hash(Path(values["data"]["token_files"]["train"]))
    trained = TokensRead(**{"data": file, "seed": 1234, "sequence_length": 32, "first": 0, "end": steps * STEP} | read)
    ledger, shape = Ledger(), shape_of(open_source(parent))
    ledger.charge("training", steps * STEP, shape, 32, training=True, tokens_per_step=STEP, read=trained)
    ledger.save(parent / LEDGER)
    return trained


def _refused(values: dict, folder: Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        Pipeline(parse_recipe(values, "test"), folder).prepare()
    assert "\n" not in str(raised.value)
    assert not folder.exists(), "something was written before it was refused"


@pytest.mark.slow
def test_a_contradiction_to_the_parents_ledger(values, tmp_path):
    _train_parent(values, 4)
    values["data"]["token_ranges"] = {"pruned": [4 * STEP, 1e9]}
    values["parent"]["pretraining_tokens"] = 5 * STEP
    _refused(values, tmp_path / "run", "counts 512 training tokens .* but 640 pretraining tokens are declared")
    values["parent"]["pretraining_tokens"] = 4 * STEP - 1
    Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()


def test_texts_that_cannot_be_measured(values, tmp_path):
    values["evaluate"] |= {"tasks": [], "texts": {"books": str(tmp_path / "books")}}
    _refused(values, tmp_path / "run", r"evaluate.texts.books: .*books.bin does not exist")
    write_token_file(tmp_path / "books", [[5] * 40], 128)
    _refused(values, tmp_path / "run", "evaluate.texts.books: .*40 tokens")
    write_token_file(tmp_path / "books", [[500] * 400], 1000)
    _refused(values, tmp_path / "run", "evaluate.texts.books: .*contains the token 500")


def test_a_damaged_ledger_of_the_parent(values, tmp_path):
    (Path(values["parent"]["source"]) / LEDGER).write_text('{"charges": [{"activity": "training"}]}')
    _refused(values, tmp_path / "run", "not a ledger of nemo_pvs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "ranges", "sentence"),
    [
        ({}, {}, r"between 0 and 512; start after them with data.token_ranges.pruned: \[512, ...\]"),
        ({"seed": 7}, {"pruned": [512, 1e9]}, r"another order \(train.data_seed 1234, train.sequence_length 32\)"),
        ({"sequence_length": 16}, {"pruned": [512, 1e9]}, "in another order"),
        ({"data_seed": 7}, {"pruned": [512, 1e9]}, "or data.token_ranges.allow_overlap: true"),
        ({}, {"pruned": [512, 1e9]}, None),
        ({"seed": 7, "data_seed": 1234}, {"pruned": [512, 1e9]}, None),
        ({"seed": 7}, {"allow_overlap": True}, None),
    ],
)
def test_text_that_the_parent_has_read(values, tmp_path, train, ranges, sentence):
    """As ``pvs train`` refuses it; and in a dry run, where the parent and the text are here."""
    _train_parent(values, 4)
    values["train"] |= train
    values["data"]["token_ranges"] = ranges
    if sentence:
        _refused(values, tmp_path / "run", sentence)
        with pytest.raises(UserError, match=sentence):
            dry_run(parse_recipe(values, "test"))
        return
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    pipeline.prepare()
    dry_run(parse_recipe(values, "test"))
    (arm, *_) = pipeline.recipe.runs
    assert pipeline.job(arm).training.order_seed == (7 if ranges.get("allow_overlap") else 1234)


@pytest.mark.slow
def test_random_arms_may_read_what_the_parent_has_read(values, tmp_path):
    _train_parent(values, 4)
    values["arms"] = ["random"]
    Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()


def test_masks_are_not_learned_on_what_the_parent_has_read(values, tmp_path):
    _train_parent(values, 4)
    values["data"]["token_ranges"] = {"pruned": [512, 1e9]}
    learn = {"tokens": 256, "first_token": 256, "global_batch_size": 4}
    values["targets"] = {"masks": {"method": "sheared-llama", "ffn": 48, "learn": learn}}
    _refused(values, tmp_path / "run", "on tokens of this data between 256 and 512; start after them")


@pytest.mark.slow
def test_text_that_must_be_tokenised_first(values, tmp_path):
    """Its hash is known then, and nothing but it has been made."""
    source = tiny_values(tmp_path / "again")
    run = tmp_path / "run"
    Pipeline(parse_recipe(source, "test"), run).prepare()
    source["data"]["token_files"] = {"train": str(run / "data" / "train")}
    _train_parent(source, 4)
    del source["data"]["token_files"]
    source["parent"]["pretraining_tokens"] = 0
    with pytest.raises(UserError, match="between 0 and 2,048; start after them"):
        Pipeline(parse_recipe(source, "test"), tmp_path / "other").prepare()
    assert not {path.name for path in (tmp_path / "other").iterdir()} & {"scores", "pruned", "random"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("evaluate.tasks", ["arc_esay"], "lm-eval has no task arc_esay"),
        ("evaluate.tasks", ["arc_easy"], "The data of the task arc_easy are not available locally"),
        ("evaluate.task_limit", 10_000, "questions of the task continuation, not for 10000"),
        ("evaluate.samples", 10_000, "too few for 10000 consecutive windows"),
        ("targets.depth.task", "winogrande", "The data of the task winogrande are not available locally"),
        ("targets.depth.task", "continuation", None),
    ],
)
def test_measurements_that_cannot_be_made(values, tmp_path, path, value, sentence):
    *blocks, key = path.split(".")
    block = values
    for name in blocks:
        block = block[name]
    block[key] = value
    if sentence:
        _refused(values, tmp_path / "run", sentence)
    else:
        Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare()


def test_what_needs_no_training_is_pruned_first(values, tmp_path):
    """So what its pruning refuses is refused before masks are learned for another target."""
    learn = {"tokens": 256, "global_batch_size": 4}
    masks = {"method": "sheared-llama", "ffn": 48, "learn": learn, "arms": ["pruned"]}
    values["targets"] = {"masks": masks, **values["targets"]}
    plan = dry_run(parse_recipe(values, "test"))
    pruning = [stage for stage in plan.stages if stage.startswith(("prune", "masks"))]
    assert pruning == ["prune/width", "prune/depth", "masks/masks", "prune/masks"]


@pytest.mark.slow
def test_a_refused_recipe_does_not_replace_that_of_the_run(values, tmp_path):
    run = tmp_path / "run"
    Pipeline(parse_recipe(values, "test"), run).prepare()
    before = (run / "recipe.yaml").read_text()
    values["evaluate"]["samples"] = 10_000
    with pytest.raises(UserError, match="too few for 10000"):
        Pipeline(parse_recipe(values, "test"), run).prepare()
    assert (run / "recipe.yaml").read_text() == before


def test_the_grid_needs_no_parent_to_say_what_its_arms_cost(values, tmp_path):
    """The tokens of a parent of ours are its range until it is there, and its ledger's from then on: the same."""
    declared = {"parent": [0, 4 * STEP - 5], "pruned": [4 * STEP - 5, 1e9]}
    values["data"]["token_ranges"] = declared
    values["budgets"] = {"pruned": [512], "random": ["equal-total-tokens"]}
    parent = Path(values["parent"]["source"])
    values["parent"] |= {"source": "not/here", "config": json.loads((parent / "config.json").read_text())}
    plan = dry_run(parse_recipe(values, "test"))
    values["parent"]["source"] = str(parent)
    _train_parent(values, 4)
    assert [arm.arm for arm in dry_run(parse_recipe(values, "test")).arms] == [arm.arm for arm in plan.arms]
    assert plan.arms[0].ledger.charges[0].tokens == 4 * STEP
