"""A dry run of every packaged recipe, without data or model, against numbers worked out apart."""

import copy
from pathlib import Path

import pytest
import yaml

from nemo_pvs.cli.dry_run_table import _ranks
from nemo_pvs.cli.main import main
from nemo_pvs.errors import UserError
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.pruning.presets import target_presets
from nemo_pvs.recipe.load import load_recipe, packaged_recipes, parse_recipe
from tests import families
from tests.conftest import make_tiny_llama

BATCH = 512 * 8192


@pytest.mark.slow
@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_is_possible(name):
    plan = dry_run(load_recipe(name))
    assert plan.arms
    for planned in plan.targets:
        assert planned.largest.memory.total < 72e9, "does not fit on an H100 with room for buffers"


def test_the_grid_is_complete():
    names = [name for name in packaged_recipes() if name.startswith("llama31_8b/") and name != "llama31_8b/p200"]
    targets = {planned.name: planned for name in names for planned in dry_run(load_recipe(name)).targets}
    published = {
        preset.name.split("/")[1]: preset for preset in target_presets().values() if "llama31_8b" in preset.name
    }
    assert {name for name in targets if name in published} == published.keys()
    for name, preset in published.items():
        shape = targets[name].expected.shape
        assert (shape.layers, shape.hidden, shape.ffn, shape.kv_groups) == (
            preset.target.layers, preset.target.hidden, preset.target.ffn, preset.target.kv_groups,
        )  # fmt: skip
    assert targets.keys() - published.keys() == {
        "wanda-unstructured", "wanda-2-4", "sparsegpt-unstructured", "sparsegpt-2-4"
    }  # fmt: skip
    for name in names:
        arms = [planned.arm for planned in dry_run(load_recipe(name)).arms]
        for target in load_recipe(name).targets:
            budgets = {(arm.initialisation, arm.training.tokens) for arm in arms if arm.target == target}
            assert budgets == {
                (initialisation, billions * 10**9)
                for initialisation in ("pruned", "random")
                for billions in (10, 30, 50, 250, 500)
            }


def test_runs_differ_only_where_they_may():
    """Parent, retraining and scratch: everything else of the training settings is the same."""
    names = [name for name in packaged_recipes() if name.startswith("llama31_8b/")]
    settings = [arm.training.model_dump() for name in names for arm in load_recipe(name).runs]
    differing = {key for one in settings for key in one if one[key] != settings[0][key]}
    assert differing == {"tokens", "learning_rate", "initialisation"}
    for name in names:
        sparse = name.split("/")[1] in ("wanda", "sparsegpt")
        for arm in load_recipe(name).runs:
            # As published: sparse baselines were drawn by another program than dense ones.
            assert arm.training.initialisation == ("normal" if sparse else "maxtext")
            rate = {"pruned": 3e-5, "random": 1e-3}[arm.initialisation] if sparse else 3e-4
            assert arm.training.learning_rate == rate


def test_tokens_flops_and_ranges_are_exact():
    plan = dry_run(load_recipe("llama31_8b/minitron_width"))
    arms = {planned.arm.name: planned for planned in plan.arms}
    retrained, scratch = arms["4b-width-pruned-50B"], arms["4b-width-random-250B"]
    assert retrained.arm.training.steps == 11921
    assert retrained.arm.tokens == 11921 * BATCH
    (parent,) = dry_run(load_recipe("llama31_8b/p200")).arms
    assert parent.arm.first_token + parent.arm.tokens == retrained.arm.first_token, "ranges overlap or leave a gap"
    assert scratch.arm.first_token == 0
    shape = plan.targets[0].expected.shape
    rate = 6 * (shape.matrix_parameters + shape.vocab * shape.hidden) + 6 * 8192 * 32 * 128 * 32
    assert retrained.ledger.training.flops == 11921 * BATCH * rate
    assert retrained.ledger.total.tokens == parent.arm.tokens + 128 * 8192 + 11921 * BATCH
    assert scratch.ledger.total.tokens == scratch.arm.tokens


def test_random_arms_get_what_makes_them_equal():
    """R50 against S50 and S250, and both in FLOPs, each from the recipe's numbers alone."""
    values = load_recipe("llama31_8b/minitron_width").model_dump()
    settings = ["equal-training-tokens", "equal-total-tokens", "equal-training-flops", "equal-total-flops"]
    values["budgets"] = {"pruned": [50e9], "random": settings}
    with pytest.raises(UserError, match=r"657,077,100,207 tokens for random arms .* \(0 to 500,000,000,000\)"):
        dry_run(parse_recipe(values, "test"))
    values["data"]["token_ranges"]["random"] = None
    plan = dry_run(parse_recipe(values, "test"))
    target = next(iter(values["targets"]))
    arms = {planned.arm.name.removeprefix(f"{target}-"): planned for planned in plan.arms}
    pruned = arms["pruned-50B"].ledger
    steps = {setting: arms[f"random-{setting}"].arm.training.steps for setting in settings}
    assert steps["equal-training-tokens"] == steps["equal-training-flops"] == 11921
    assert steps["equal-total-tokens"] == -(-(200_001_191_936 + 128 * 8192 + 11921 * BATCH) // BATCH)
    for setting in settings:
        scratch = arms[f"random-{setting}"]
        assert scratch.arm.setting == setting
        amount = "tokens" if setting.endswith("tokens") else "flops"
        spent = getattr(pruned.training if "training" in setting else pruned.total, amount)
        took = getattr(scratch.ledger.total, amount)
        assert spent <= took < spent + took / scratch.arm.training.steps, "not to a step"


def test_what_a_task_reads_is_not_known_beforehand():
    values = load_recipe("smollm2_135m/demo").model_dump()
    values["targets"] = {"depth": values["targets"]["depth"] | {"task": "winogrande", "task_limit": 50}}
    arms = {planned.arm.name: planned.ledger for planned in dry_run(parse_recipe(values, "test")).arms}
    assert [charge.activity for charge in arms["depth-pruned"].charges][1:] == ["search", "training"]
    assert arms["depth-pruned"].total == (None, None)
    assert arms["depth-random"].total == arms["depth-random"].training
    values["parent"]["pretraining_tokens"] = 1e12
    values["budget"] = "equal-total-tokens"
    with pytest.raises(UserError, match="the tokens of its search are unknown; choose an equal-training setting"):
        dry_run(parse_recipe(values, "test"))
    values["budget"] = "equal-training-flops"
    assert [planned.arm.tokens for planned in dry_run(parse_recipe(values, "test")).arms] == [49152, 49152]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("targets.width.layout", {"tensor_parallel": 3}, "Target width: Tensor parallelism 3 does not divide"),
        ("targets.depth.layout", {"pipeline_parallel": 4}, "Target depth: Pipeline parallelism 4 does not divide 14"),
        (
            "targets.depth.layout",
            {"pipeline_parallel": 2, "virtual_pipeline": 2},
            "A virtual pipeline of 2 does not divide the 7 layers of a pipeline stage; legal for this model: 1, 7",
        ),
        ("targets.depth.layout", {"virtual_pipeline": 7}, "needs pipeline parallelism of at least 2; leave it out"),
        (
            "targets.depth.layout",
            {"pipeline_parallel": 2, "virtual_pipeline": 7, "data_parallel": 2},
            r"virtual_pipeline needs the micro-batches per step \(1\) to be a multiple of pipeline_parallel \(2\)",
        ),
        (
            "targets.width",
            {"method": "flap", "ratio": 0.2, "layout": {"pipeline_parallel": 2, "virtual_pipeline": 2}},
            "Target width: A virtual pipeline of 2 does not divide the 15 layers of a pipeline stage; legal for this",
        ),
        ("targets.width.hidden", 577, "asks for hidden=577, but the model has 576"),
        ("targets.width", {"method": "wanda", "sparsity": "2:5"}, "needs groups of 5 inputs, but q_proj has 576"),
        ("train.sequence_length", 10000, "the parent's context ends at 8192"),
        ("targets.width.layout", {"micro_batch_size": 3}, "is not a multiple of micro_batch_size"),
        ("train.mask_check_steps", 5, "train.mask_check_steps only applies to sparse models, and no target is sparse"),
        ("train.clip_before_mask", True, "only applies to sparse models, and no target is sparse; leave it out"),
        (
            "targets.width.layout",
            {"context_parallel": 7},
            "splits a sequence into 14 equal chunks, but 14 does not divide sequence_length 256",
        ),
        ("targets.width.layout", {"sequence_parallel": True}, "sequence_parallel needs tensor_parallel of at least 2"),
        ("parent.config", None, "not a folder here, and the recipe has no parent.config"),
    ],
)
def test_what_is_impossible_is_refused(path, value, sentence):
    values = copy.deepcopy(load_recipe("smollm2_135m/demo").model_dump())
    *blocks, key = path.split(".")
    block = values
    for name in blocks:
        block = block[name]
    block[key] = value
    with pytest.raises(UserError, match=sentence):
        dry_run(parse_recipe(values, "test"))


IMPOSSIBLE = {
    "asks for hidden=577, but the model has 576": {"method": "sheared-llama", "hidden": 577},
    "is pruned in 97 rounds but trains for 96 steps": {"method": "adapt-pruner", "ratio": 0.2, "stages": 97},
    "leave nothing for the layers in addition to the embeddings": {"method": "adapt-pruner", "ratio": 0.99},
    "at which a layer would be pruned to nothing next": {
        "method": "efficient-llm",
        "pruning_aware": {"parameters": 1000, "tokens": 49152},
    },
    "takes at least 203 removals, so 203 steps, but 49,152 tokens are 96 steps": {
        "method": "efficient-llm",
        "pruning_aware": {"parameters": 70e6, "tokens": 49152},
    },
    "The teacher's vocabulary has 128 tokens and the student's 49,152": {"method": "minitron-depth", "layers": 14},
}


@pytest.mark.slow
def test_what_learned_and_iterative_methods_cannot_do_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    demo = Path(__file__).parents[2] / "recipes" / "smollm2_135m" / "demo.yaml"
    make_tiny_llama(tmp_path / "teacher")
    for number, (sentence, target) in enumerate(IMPOSSIBLE.items()):
        train = {"tokens": 49152, "sequence_length": 256, "global_batch_size": 2, "micro_batch_size": 2}
        if "teacher" in sentence:
            train["distill"] = {"teacher": str(tmp_path / "teacher")}
        recipe = tmp_path / f"{number}.yaml"
        values = {"extends": str(demo), "targets": {"width": None, "depth": None, "one": target}, "train": train}
        recipe.write_text(yaml.safe_dump(values))
        monkeypatch.setattr("sys.argv", ["pvs", "run", str(recipe), "--dry-run"])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == 2, said.out
        assert sentence in said.err
        assert said.err.startswith("pvs: Target one: ")
        assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ({"method": "flap", "ratio": 0.2, "bias": False}, "The family mistral has no class for uneven layers"),
        ({"method": "adapt-pruner", "ratio": 0.2, "of": "body"}, "The family mistral has no class for uneven layers"),
        ({"method": "flap", "ratio": 0.2, "structure": "UL-MM"}, "The family mistral has no .*bias; use a method"),
        ({"method": "flap", "ratio": 0.2, "structure": "UL-MM", "bias": False}, None),
        ({"method": "flap", "ratio": 0.2, "uniform": True, "bias": False}, None),
    ],
)
def test_a_model_that_no_class_could_load_is_refused_before_any_work(target, sentence, monkeypatch):
    families.without_uneven_classes(monkeypatch)
    values = load_recipe("smollm2_135m/demo").model_dump()
    config = families.tiny_config("mistral", num_hidden_layers=4, vocab_size=49152, max_position_embeddings=4096)
    values["parent"] = {"config": config.to_dict(), "source": "hf://nobody/mistral"}
    values["targets"] = {"one": target}
    if sentence is None:
        assert dry_run(parse_recipe(values, "test")).targets
        return
    with pytest.raises(UserError, match=f"^Target one: {sentence}"):
        dry_run(parse_recipe(values, "test"))


def test_a_parent_that_nemo_cannot_train_is_refused_before_any_work():
    values = load_recipe("adapt_pruner/qwen25_0p5b").model_dump()
    values["parent"]["config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(UserError, match="rope_scaling of this model is yarn, which NeMo's qwen2 lacks"):
        dry_run(parse_recipe(values, "test"))


def test_a_layout_is_shown_with_all_that_is_not_as_usual():
    values = load_recipe("smollm2_135m/demo").model_dump()
    depth = values["targets"]["depth"]
    depth["layout"] = {"pipeline_parallel": 4, "first_stage_layers": 2, "distributed_optimizer": False}
    values["targets"]["width"]["layout"] = {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2}
    shown = [_ranks(planned.target.layout) for planned in dry_run(parse_recipe(values, "test")).targets]
    assert shown == ["2 x 1 x 1, CP 2, SP", "1 x 4 x 1, first stage 2, plain optimizer"]


def test_the_command_prints_it_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments, code in (
        (["run", "smollm2_135m/sparse", "--dry-run"], 0),
        (["run", "smollm2_135m/nothing", "--dry-run"], 2),
    ):
        monkeypatch.setattr("sys.argv", ["pvs", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code
    out = capsys.readouterr().out
    for part in ("wanda 2:4", "3 x 1 x 1", "49,152", "134,515,008", "stages: parent, data, prune/wanda_pp2"):
        assert part in out
    assert not list(tmp_path.iterdir())
