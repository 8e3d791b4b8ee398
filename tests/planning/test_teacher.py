"""Distilled arms: who learns from whom, what it costs, and which teachers are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.model.layout import Layout as WeightLayout
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.memory import parameters_on, training_memory
from nemo_pvs.planning.teacher import check_tokens
from nemo_pvs.recipe.load import load_recipe, parse_recipe
from nemo_pvs.recipe.recipe import Recipe
from tests.conftest import make_tiny_llama, save_tiny_tokenizer, tiny_llama_config

CONFIG = {**tiny_llama_config().to_dict(), "model_type": "llama"}
PARENT = WeightLayout.for_config(CONFIG).shape(CONFIG)
PER_STEP = 8 * 32


def distilled_recipe(distill: Any, *, target: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    values = {
        "name": "tiny",
        "title": "Tiny",
        "parent": {"source": "nowhere", "config": CONFIG, "pretraining_tokens": 1e6},
        "data": {"source": "text"},
        "calibrate": {"samples": 4, "sequence_length": 32},
        "targets": {"depth": {"method": "minitron-depth", "layers": 2, **(target or {})}},
        "train": {
            "tokens": 4 * PER_STEP,
            "sequence_length": 32,
            "global_batch_size": 8,
            "validation_samples": 8,
            "learning_rate": 1e-3,
            "distill": distill,
        },
        "evaluate": {"sequence_length": 32},
        **changes,
    }
    return parse_recipe(values, "tiny.yaml")


def _learners(recipe: Recipe) -> list[str]:
    return [arm.name for arm in recipe.runs if arm.training.distill]


def test_both_arms_of_a_comparison_learn_or_those_that_are_named() -> None:
    assert _learners(distilled_recipe({})) == ["depth-pruned", "depth-random"]
    assert _learners(distilled_recipe({"arms": ["random"]})) == ["depth-random"]
    assert _learners(distilled_recipe(None)) == []
    both = load_recipe("smollm2_135m/distill")
    assert _learners(both) == ["width_distilled-pruned", "width_distilled-random"]
    assert both.targets["width"].options == both.targets["width_distilled"].options


def test_runs_without_a_teacher_keep_their_identity() -> None:
    """Stages are skipped by a hash of these settings; runs of before distillation must not be trained again."""
    assert "distill" not in distilled_recipe(None).train.model_dump()
    again = parse_recipe(distilled_recipe({"temperature": 2}).model_dump(), "again")
    assert again.train.distill == distilled_recipe({"temperature": 2}).train.distill
    logits_alone = distilled_recipe({}).train.distill
    assert logits_alone
    hidden = {"layer_pairs", "hidden_weight", "embedding_weight", "hidden_loss", "dynamic_weight"}
    assert not hidden & set(logits_alone.model_dump())
    pairs = distilled_recipe({"layer_pairs": [[1, 2], [2, 4]], "hidden_weight": 1})
    assert parse_recipe(pairs.model_dump(mode="json"), "again").train.distill == pairs.train.distill


def _charges(ledger: Ledger) -> list[tuple[str, int | None]]:
    return [(charge.activity, charge.tokens) for charge in ledger.charges]


def test_a_teacher_is_charged_to_pruned_and_random_alike() -> None:
    """Its forward passes over every training token, and what it took to have it: by hand, without attention."""
    plan = dry_run(distilled_recipe({}))
    pruned, scratch = (planned.ledger for planned in plan.arms)
    tokens = 4 * PER_STEP
    assert ("teacher", tokens) in _charges(pruned)
    assert _charges(scratch) == [("parent pretraining", 10**6), ("training", tokens), ("teacher", tokens)]
    forward = 2 * (PARENT.matrix_parameters + PARENT.vocab * PARENT.hidden)
    forward += 2 * 32 * PARENT.head_dim * PARENT.heads * PARENT.layers
    assert scratch.charges[-1].flops == pruned.charges[-1].flops == tokens * forward
    alone = dry_run(distilled_recipe({"arms": ["pruned"]})).arms[1].ledger
    assert _charges(alone) == [("training", tokens)]
    assert alone.training == scratch.training, "the teacher is no training of the student"


def test_a_projection_is_charged_forward_and_back(tmp_path: Path) -> None:
    """At each place, where widths differ; by hand: 96 x 64 numbers multiplied and added three times a token."""
    make_tiny_llama(tmp_path, hidden_size=96)
    hidden = {"layer_pairs": [[1, 2], [2, 3]], "hidden_weight": 1, "embedding_weight": 1}
    plain, compared, alike = (
        dry_run(distilled_recipe({"teacher": teacher, **how})).arms[1].ledger.charges[-1].flops
        for teacher, how in ((str(tmp_path), {}), (str(tmp_path), hidden), ("parent", hidden))
    )
    tokens = 4 * PER_STEP
    assert compared - plain == tokens * 3 * 6 * 96 * 64
    assert alike == dry_run(distilled_recipe({})).arms[1].ledger.charges[-1].flops
    wider = distilled_recipe(
        {"teacher": str(tmp_path), "pretraining_tokens": 1e6, **hidden}, budget="equal-total-flops"
    )
    pruned, scratch = (planned.ledger for planned in dry_run(wider).arms)
    a_step = sum(charge.flops / charge.steps for charge in scratch.charges if charge.steps)
    assert pruned.total.flops <= scratch.total.flops < pruned.total.flops + a_step


@pytest.mark.parametrize("setting", ["equal-training-tokens", "equal-total-tokens", "equal-total-flops"])
@pytest.mark.parametrize("arms", [["pruned", "random"], ["pruned"]])
def test_equal_terms_count_the_teacher_of_scratch(setting: str, arms: list[str]) -> None:
    plan = dry_run(distilled_recipe({"arms": arms}, budget=setting))
    pruned, scratch = (planned.ledger for planned in plan.arms)
    amount = "flops" if setting.endswith("flops") else "tokens"
    what = "training" if "training" in setting else "total"
    spent, took = (getattr(getattr(ledger, what), amount) for ledger in (pruned, scratch))
    a_step = sum(getattr(charge, amount) / charge.steps for charge in scratch.charges if charge.steps)
    if what == "training":
        assert spent == took
    assert spent <= took < spent + a_step


def test_another_teacher_brings_its_own_ledger(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, num_hidden_layers=6)
    own = Ledger()
    own.charge("training", 512, PARENT, 0, training=True)
    own.save(tmp_path / LEDGER)
    scratch = dry_run(distilled_recipe({"teacher": str(tmp_path)})).arms[1].ledger
    assert _charges(scratch)[0] == ("parent pretraining", 512)
    (tmp_path / LEDGER).unlink()
    scratch = dry_run(distilled_recipe({"teacher": str(tmp_path), "pretraining_tokens": 1e9})).arms[1].ledger
    assert _charges(scratch)[0] == ("parent pretraining", 10**9)
    assert dry_run(distilled_recipe({"teacher": str(tmp_path)})).arms[1].ledger.total.tokens is None


def test_memory_counts_the_teacher() -> None:
    recipe = distilled_recipe({})
    layout = recipe.targets["depth"].layout
    student = PARENT.replace(layers=2)
    plain = training_memory(student, layout, recipe.train.model_copy(update={"distill": None}))
    cached = training_memory(student, layout, recipe.train)
    taught = training_memory(student, layout, recipe.train, PARENT)
    # The divergence's gradient and the fp32 copy of the logits; at that time the teacher's logits are gone.
    assert cached.total - plain.total == 32 * (2 + 4) * PARENT.vocab
    assert taught.total - cached.total == 2 * PARENT.parameters
    halves = layout.model_copy(update={"pipeline_parallel": 2})
    more = training_memory(student, halves, recipe.train, PARENT).teacher
    hidden_of_a_step = 8 * 32 * 2 * PARENT.hidden
    assert more == 2 * parameters_on(PARENT, halves, 1) + hidden_of_a_step
    places = {"layer_pairs": [[1, 2], [2, 4]], "hidden_weight": 1, "embedding_weight": 1}
    compared = distilled_recipe(places).train
    assert training_memory(student, layout, compared, PARENT).teacher == taught.teacher + 3 * 32 * 2 * PARENT.hidden
    assert training_memory(student, halves, compared, PARENT).teacher == more + 3 * hidden_of_a_step
    narrow = student.replace(hidden=32)
    without, projected = (training_memory(narrow, layout, how, PARENT).teacher for how in (recipe.train, compared))
    assert projected - without == 3 * 32 * 2 * PARENT.hidden + 16 * 32 * PARENT.hidden


@pytest.mark.parametrize(
    ("distill", "changes", "sentence"),
    [
        ({"temperature": 0}, {}, r"train.distill.temperature: input should be greater than 0, not 0"),
        ({"top_k": 0}, {}, "train.distill.top_k: input should be greater than or equal to 1, not 0"),
        ({"kl_weight": 0}, {}, "train.distill.kl_weight: input should be greater than 0"),
        ({"temperatur": 1}, {}, "unknown key train.distill.temperatur; did you mean temperature?"),
        ({"arms": ["random"]}, {"arms": ["pruned"]}, "train.distill applies to none of the arms"),
        ({}, {"target": {"distill": False}}, "train.distill applies to none of the arms"),
        ({"hidden_weight": 1}, {}, "layer_pairs and hidden_weight belong together; give both, or neither"),
        ({"layer_pairs": [[1, 1]]}, {}, "layer_pairs and hidden_weight belong together"),
        (
            {"layer_pairs": [[2, 3], [1, 4]], "hidden_weight": 1},
            {},
            r"layer_pairs must increase in student and teacher, but \[1, 4\] follows \[2, 3\]",
        ),
        (
            {"dynamic_weight": True},
            {},
            "dynamic_weight scales hidden state losses; also give hidden_weight or embedding_weight",
        ),
        ({"layer_pairs": [[0, 1]], "hidden_weight": 1}, {}, "should be greater than or equal to 1, not 0"),
        (
            {"layer_pairs": [[1, 2], [3, 4]], "hidden_weight": 1},
            {},
            "Target depth: layer_pairs compares layers 3 and 4 of student and teacher, but the student has 2 layers",
        ),
        (
            {"layer_pairs": [[2, 5]], "hidden_weight": 1},
            {},
            "Target depth: layer_pairs compares layers 2 and 5 of student and teacher, but the teacher has 4 layers",
        ),
        ({"hidden_loss": "l1"}, {}, "train.distill.hidden_loss"),
        ({"teacher": "nowhere/else"}, {}, "nowhere/else does not exist"),
        ({}, {"layout": {"context_parallel": 2}}, "Target depth: Distillation does not support context_parallel 2"),
    ],
)
def test_what_cannot_be_taught_is_refused(distill: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        dry_run(distilled_recipe(distill, **changes))


def test_a_teacher_of_another_vocabulary_or_for_another_layout_is_refused(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "shorter", max_position_embeddings=16)
    with pytest.raises(UserError, match=r"train.sequence_length is 32, but teacher .*shorter's context ends at 16"):
        dry_run(distilled_recipe({"teacher": str(tmp_path / "shorter")}))
    make_tiny_llama(tmp_path / "larger", vocab_size=256)
    with pytest.raises(UserError, match="Target depth: The teacher's vocabulary has 256 tokens and the student's 128"):
        dry_run(distilled_recipe({"teacher": str(tmp_path / "larger")}))
    make_tiny_llama(tmp_path / "odd", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"The teacher must fit on its student's ranks: Pipeline parallelism 2 does"):
        dry_run(distilled_recipe({"teacher": str(tmp_path / "odd")}, layout={"pipeline_parallel": 2}))


def test_tokenizers_must_agree_on_every_token(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path / "one")
    save_tiny_tokenizer(tmp_path / "same")
    # What says how to speak to a model is not what its tokens are.
    (tmp_path / "same" / "chat_template.jinja").write_text("{{ messages }}")
    check_tokens(tmp_path / "same", tmp_path / "one")
    save_tiny_tokenizer(tmp_path / "fewer", vocab=100)
    with pytest.raises(UserError, match=r"differ, first at token 100 \('w100'\); give a teacher with the student's"):
        check_tokens(tmp_path / "fewer", tmp_path / "one")


def test_the_dry_run_shows_the_teacher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_pvs.cli.main import main

    monkeypatch.setattr("sys.argv", ["pvs", "run", "smollm2_135m/distill", "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert "distilled: pruned and random arms from parent; 1 x KL(teacher || student), T = 1" in out
    assert "teacher FLOPs" in out


def test_the_published_setting_fits() -> None:
    plan = dry_run(load_recipe("minitron/llama31_4b"))
    assert {planned.arm.training.tokens_per_step for planned in plan.arms} == {1152 * 8192}
    parent: Shape = plan.parent
    for planned in plan.targets:
        assert planned.largest.memory.teacher > parent.parameters, "half of its weights at TP=2, 2 bytes each"
