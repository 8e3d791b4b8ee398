"""What scratch gets, against sums by hand and the paper's step counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import PrunedArm, parse_setting, scratch_budget
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.pruned_arms import of_recipe, pruned_arms
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.reporting.results import Results
from tests.planning.test_teacher import distilled_recipe

PARENT = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256, tied=False)
DEPTH = PARENT.replace(layers=16)
WIDTH = PARENT.replace(hidden=3072, ffn=9216)
PER_STEP = 512 * 8192
P200, R50 = 50_000 * PER_STEP, 12_500 * PER_STEP


def _arm(shape: Shape, *, masked: int = 0, calibration: int = 0) -> PrunedArm:
    """Return P200-R50 of the paper."""
    ledger = Ledger()
    ledger.charge("parent pretraining", P200, PARENT, 0, training=True, tokens_per_step=PER_STEP)
    if calibration:
        ledger.charge("calibration", calibration, PARENT, 8192, training=False)
    ledger.charge("training", R50, shape, 0, training=True, masked_parameters=masked, tokens_per_step=PER_STEP)
    return PrunedArm("R50", ledger, shape, PER_STEP, masked_parameters=masked)


def test_the_papers_settings_give_its_steps() -> None:
    training = scratch_budget(_arm(DEPTH), "equal-training-tokens")
    assert (training.steps, training.trained_tokens, training.tokens) == (12_500, R50, R50)  # S50
    total = scratch_budget(_arm(DEPTH), "equal-total-tokens")
    assert (total.steps, total.trained_tokens) == (62_500, P200 + R50)  # S250
    assert total.spent == (P200 + R50, _arm(DEPTH).ledger.total.flops)


def test_calibration_costs_scratch_a_step_more() -> None:
    assert scratch_budget(_arm(DEPTH, calibration=128 * 8192), "equal-total-tokens").steps == 62_501


@pytest.mark.parametrize(("shape", "billions"), [(DEPTH, 424), (WIDTH, 414)])
def test_at_equal_total_flops_scratch_gets_far_more_tokens(shape: Shape, billions: int) -> None:
    # By hand for the labels' token counts; these are 4.86 % longer.
    budget = scratch_budget(_arm(shape), "equal-total-flops")
    assert budget.tokens / 1.048576 == pytest.approx(billions * 1e9, rel=0.002)
    rate = 6 * (shape.matrix_parameters + shape.vocab * shape.hidden)
    parent = 6 * (PARENT.matrix_parameters + PARENT.vocab * PARENT.hidden)
    spent = P200 * parent + R50 * rate
    assert (budget.tokens - 1) * rate < spent <= budget.tokens * rate
    assert budget.steps == -(-budget.tokens // PER_STEP)
    assert budget.flops == budget.steps * PER_STEP * rate


def test_equal_training_flops_are_equal_training_tokens_of_one_shape() -> None:
    assert scratch_budget(_arm(WIDTH), "equal-training-flops").tokens == R50


def test_zeros_that_are_skipped_are_cheap_for_scratch_too() -> None:
    masked = PARENT.matrix_parameters // 2
    arm = _arm(PARENT, masked=masked)
    assert scratch_budget(arm, "equal-total-flops").tokens == P200 + R50  # dense kernels: one rate for all
    skipped = scratch_budget(arm, "equal-total-flops", zeros_skipped=True)
    dense = 6 * (PARENT.matrix_parameters + PARENT.vocab * PARENT.hidden)
    sparse = dense - 6 * masked
    assert skipped.tokens == -(-(P200 * dense + R50 * sparse) // sparse)
    assert scratch_budget(arm, "equal-training-flops", zeros_skipped=True).tokens == R50


def test_an_unknown_parent_leaves_only_the_training_settings() -> None:
    arm = _arm(DEPTH)
    arm.ledger.charges[0] = dataclasses.replace(arm.ledger.charges[0], tokens=None, flops=None)
    assert scratch_budget(arm, "equal-training-tokens").steps == 12_500
    for setting in ("equal-total-tokens", "equal-total-flops"):
        with pytest.raises(UserError, match="tokens of its parent pretraining are unknown; declare them"):
            scratch_budget(arm, setting)  # type: ignore[arg-type]


def test_a_ledger_without_training_is_refused() -> None:
    with pytest.raises(UserError, match="has no training"):
        scratch_budget(PrunedArm("empty", Ledger(), DEPTH, PER_STEP), "equal-training-tokens")
    with pytest.raises(UserError, match="no setting 'equal-steps'; choose one of equal-training-tokens, equal-total"):
        parse_setting("equal-steps")


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def _recipe(**parent: Any) -> Any:
    values = {
        "name": "tiny",
        "title": "Tiny",
        "parent": {"source": "nowhere", "config": CONFIG, "pretraining_tokens": 1e6, **parent},
        "data": {"source": "text"},
        "calibrate": {"samples": 4, "sequence_length": 32},
        "targets": {
            "depth": {"method": "minitron-depth", "layers": 2},
            "sparse": {"method": "wanda", "sparsity": "2:4"},
        },
        "train": {
            "tokens": 1000,
            "sequence_length": 32,
            "global_batch_size": 8,
            "validation_samples": 8,
            "learning_rate": 1e-3,
        },
    }
    return parse_recipe(values, "tiny.yaml")


def test_the_ledger_of_a_recipe_is_known_before_it_runs() -> None:
    depth, sparse = of_recipe(_recipe())
    steps = -(-1000 // 256)
    assert (depth.name, depth.tokens_per_step, depth.shape.layers) == ("depth-pruned", 256, 2)
    assert [(one.activity, one.tokens) for one in sparse.ledger.charges] == [
        ("parent pretraining", 10**6),
        ("calibration", 4 * 32),
        ("training", steps * 256),
    ]
    assert sparse.ledger.charges[-1].steps == steps
    matrices = sparse.shape.matrix_parameters
    assert sparse.masked_parameters == matrices // 2
    rate = sparse.shape.flops_per_token(sequence_length=32, training=True)
    assert sparse.ledger.training.flops == steps * 256 * rate
    assert sparse.ledger.training_zeros_skipped.flops == steps * 256 * (rate - 3 * matrices)
    assert scratch_budget(sparse, "equal-total-tokens").tokens == 10**6 + 4 * 32 + steps * 256
    assert scratch_budget(depth, "equal-training-flops").steps == steps


def test_a_parent_that_is_not_here_has_no_budget() -> None:
    with pytest.raises(UserError, match=r"The parent nowhere is not a folder here"):
        of_recipe(_recipe(config=None))


def test_the_pruned_arms_of_a_run_are_found(results: Results, tmp_path: Path) -> None:
    results.recipe = {"train": {"sequence_length": 64, "global_batch_size": 8}}
    results.save(tmp_path / "results.json")
    arms = pruned_arms(str(tmp_path))
    assert [arm.name for arm in arms] == ["depth, pruned", "width, pruned"]
    assert [arm.tokens_per_step for arm in arms] == [512, 512]
    # Training was charged with attention, and so is scratch: the same tokens for the same FLOPs.
    assert scratch_budget(arms[0], "equal-training-flops").tokens == arms[0].ledger.training.tokens
    results.arms = [arm for arm in results.arms if arm.initialisation == "random"]
    results.save(tmp_path / "results.json")
    with pytest.raises(UserError, match="has no pruned arm"):
        pruned_arms(str(tmp_path))


def test_a_parents_own_ledger_counts(tmp_path: Path) -> None:
    own = Ledger()
    own.charge("training", 300, DEPTH, 0, training=True)
    own.save(tmp_path / LEDGER)
    for declared in (None, 300):
        child = Ledger()
        child.inherit_checkpoint(tmp_path, DEPTH, declared)
        assert child.total == own.total
        assert child.charges[0].activity == "parent pretraining"
    with pytest.raises(UserError, match=r"counts 300 training tokens .* but 200 pretraining tokens are declared"):
        Ledger().inherit_checkpoint(tmp_path, DEPTH, 200)
    with pytest.raises(UserError, match="counts 300 training tokens"):
        Ledger().inherit_checkpoint(tmp_path, DEPTH, 301)  # nothing says that it was trained in steps
    declared_only = Ledger()
    declared_only.inherit_checkpoint(tmp_path / "none", DEPTH, 200)
    assert declared_only.total == (200, 200 * DEPTH.flops_per_token(training=True))


def test_a_declaration_within_a_step_of_the_ledgers_count_is_that_count(tmp_path: Path) -> None:
    """200e9 tokens of the paper's parent are 47,684 steps of 4,194,304: 200,001,191,936 tokens."""
    step, exact = 512 * 8192, 200_001_191_936
    own = Ledger()
    own.charge("training", exact, DEPTH, 8192, training=True, tokens_per_step=step)
    own.save(tmp_path / LEDGER)
    for declared in (200_000_000_000, exact - step + 1, exact, exact + step - 1):
        child = Ledger()
        child.inherit_checkpoint(tmp_path, DEPTH, declared)
        assert child.total.tokens == exact
    for declared in (exact - step, exact + step):
        with pytest.raises(UserError, match=r"counts 200,001,191,936 training tokens .* leave the declaration out"):
            Ledger().inherit_checkpoint(tmp_path, DEPTH, declared)


def test_a_finished_run_says_what_its_scratch_arm_learnt_from(results: Results, tmp_path: Path) -> None:
    """``pvs budget RUN`` answers as the recipe would: the scratch arm's own ledger has its teacher."""
    recipe = distilled_recipe({})
    (planned,) = of_recipe(recipe)
    plan = dry_run(recipe)
    results.recipe = recipe.model_dump()
    arms = [arm for arm in results.arms if arm.target == "depth"]
    for arm in arms:
        (same,) = (one for one in plan.arms if one.arm.initialisation == arm.initialisation)
        arm.ledger, arm.shape, arm.masked_parameters = same.ledger, plan.targets[0].expected.shape, 0
        arm.validation = []
    results.arms = arms
    results.save(tmp_path / "results.json")
    (found,) = pruned_arms(str(tmp_path))
    for setting in ("equal-training-tokens", "equal-total-tokens", "equal-total-flops"):
        assert scratch_budget(found, parse_setting(setting)) == scratch_budget(planned, parse_setting(setting))
    assert found.scratch_teacher_flops
