import copy
import inspect
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.pruning.registry import method_named, methods
from nemo_pvs.pruning.sparse.magnitude import MagnitudeSource
from nemo_pvs.pruning.sparse.sparsegpt import SparseGPT
from nemo_pvs.pruning.structured.adapt_pruner import AdaptPrunerSettings
from nemo_pvs.pruning.structured.flap import plan_flap
from nemo_pvs.pruning.structured.joint import plan_joint
from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner
from nemo_pvs.pruning.structured.magnitude_sp import plan_magnitude_sp
from nemo_pvs.pruning.structured.shortgpt import plan_shortgpt
from nemo_pvs.pruning.structured.wanda_sp import plan_wanda_sp
from nemo_pvs.pruning.structured.width import plan_width
from nemo_pvs.recipe.data import TokenFiles
from nemo_pvs.recipe.fields import RecipeBlock
from nemo_pvs.recipe.load import load_recipe, packaged_recipes, parse_recipe
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.system.files import StrictLoader, read_yaml


@pytest.fixture
def values() -> dict:
    return load_recipe("smollm2_135m/demo").model_dump()


def test_every_packaged_recipe_reads():
    assert "smollm2_135m/demo" in packaged_recipes()
    for name in packaged_recipes():
        assert load_recipe(name).name


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("trian", {}, "unknown key trian; did you mean train?"),
        ("train.learning_rat", 1, "unknown key train.learning_rat; did you mean learning_rate?"),
        ("targets.width.hiden", 1, "unknown key targets.width.hiden; did you mean hidden?"),
        ("targets.width.layout.tensor_paralel", 2, "did you mean tensor_parallel?"),
        ("data.split.xyz", 0.5, "unknown key data.split.xyz; known keys are train, validation"),
        ("train.tokens", "many", "train.tokens: "),
        ("train.tokens", 1.5, "must be a whole number"),
        ("train.tokens", math.inf, "train.tokens: must be a whole number, not inf"),
        ("data.token_ranges.random", [0, math.inf], "data.token_ranges.random.1: must be a whole number, not inf"),
        ("train.learning_rate", math.inf, "train.learning_rate: input should be a finite number, not inf"),
        ("train.validation_samples", 33, "must be a multiple of global_batch_size"),
        ("data.split.train", 0.9, "must add up to 1"),
        ("targets.width.method", "minitron-with", "targets.width.method"),
        ("targets.width.learning_rate", {"pruned": 1, "randon": 1}, "unknown key targets.width.learning_rate.randon"),
        ("targets.width.metric", "WIFV", "targets.width: minitron-width has no metric; its options are layers"),
        ("targets.width.ratio", 0.5, "targets.width: more than one option says how much to remove; give only one"),
        ("targets.depth", {"method": "wanda"}, "targets.depth: nothing says how much to remove; give at least one of"),
        ("targets.depth", {"method": "wanda", "sparsity": "4:2"}, "removes nothing or leaves nothing"),
        ("targets.depth", {"method": "wanda", "layers": 3}, "wanda has no layers; its options are sparsity"),
        ("targets.depth", {"method": "dense", "ratio": 0.5}, "dense has no ratio"),
        ("targets.depth", {"method": "dense", "keep_parent_embeddings": True}, "leave keep_parent_embeddings out"),
        ("targets.width.task", "winogrande", "minitron-width has no task"),
        ("targets.depth.task_data", "here", "task_data and task_limit only apply to a task; name one under task"),
        ("targets.depth.task_limit", 9, "task_data and task_limit only apply to a task; name one under task"),
        (
            "targets.depth",
            {"method": "minitron-depth", "layers": 9, "task": "winogrande", "search": "greedy"},
            "a task compares contiguous runs of layers; leave search out",
        ),
        ("budgets", {"prund": [1e3]}, "unknown key budgets.prund; did you mean pruned?"),
        (
            "budgets",
            {"pruned": [1e3], "random": ["equal-steps"]},
            "must be a number of tokens or one of equal-training-",
        ),
        ("budgets", {"random": ["equal-total-tokens"]}, "is relative to pruned arms; give their budgets under pruned"),
        ("budgets", ["equal-total-tokens"], "budgets.0: input should be a valid number"),
        ("budgets", [1000, 2048, 1e3], "budgets lists 1,000 twice for pruned arms; remove one"),
        (
            "budgets",
            {"pruned": [1e3], "random": ["equal-total-tokens", 1e3, "equal-total-tokens"]},
            "budgets lists equal-total-tokens twice for random arms; remove one",
        ),
        ("budget", "equal-steps", "budgets.random.0: must be a number of tokens or one of equal-training-tokens"),
        ("data.token_files", {"train": "a", "validation": "b", "calibration": "c", "test": "d"}, "either source or"),
        ("data.token_ranges.pruned", [0, 100], "a budget of 49,152 tokens for pruned arms goes past the end"),
        ("data.token_ranges.parent", [0, 100], "would read tokens that the parent was trained on (0 to 100)"),
        ("data.token_ranges.random", [9, 9], "the range of random ends before it begins"),
        ("targets", {"../scores": {"method": "dense"}}, "a target names folders of the run, and '../scores'"),
        ("targets", {"a/b": {"method": "dense"}}, "and 'a/b' cannot; rename it"),
        ("targets", {"": {"method": "dense"}}, "and '' cannot; rename it"),
        ("name", "", "name: string should have at least 1 character"),
        ("arms", ["pruned", "pruned"], "arms lists pruned twice; remove one"),
        ("targets.width.arms", ["random", "random"], "targets.width.arms lists random twice; remove one"),
        ("targets", {"a[b]": {"method": "dense"}}, "and 'a[b]' cannot; rename it"),
        ("targets", {"a\nb": {"method": "dense"}}, "cannot; rename it"),
        ("targets", {"a" * 121: {"method": "dense"}}, "cannot; rename it"),
        (
            "targets",
            {"w": {"method": "minitron-width", "ffn": 768, "stages": 3}, "w-stage-2": {"method": "dense"}},
            "targets w-stage-2 and w would share files; rename one of them",
        ),
        (
            "targets",
            {"w": {"method": "minitron-width", "ffn": 768, "stages": 2}, "w-stages": {"method": "dense"}},
            "targets w-stages and w would share files; rename one of them",
        ),
        ("budgets", [0], "budgets.0: input should be greater than or equal to 1, not 0."),
        ("budgets", {"pruned": [1e3], "random": [0]}, "budgets.random.0: input should be greater than or equal to 1"),
        ("budgets", [], "budgets: list should have at least 1 item"),
        ("budgets", {"pruned": [], "random": []}, "so nothing would be trained; give one"),
        ("train.tokens", 0, "train.tokens: input should be greater than or equal to 1, not 0."),
        ("train.adam_betas", [0.9, 1], "train.adam_betas.1: input should be less than 1, not 1."),
        ("train.adam_eps", -1e-8, "train.adam_eps: input should be greater than 0"),
        ("parent.source", None, "give the source, or the config and the tokenizer"),
    ],
)
def test_a_wrong_key_or_value_gets_one_sentence(values, path, value, sentence):
    *blocks, key = path.split(".")
    block = values
    for name in blocks:
        block = block[name]
    block[key] = value
    with pytest.raises(UserError) as raised:
        parse_recipe(values, "my.yaml")
    assert str(raised.value).startswith("my.yaml: ")
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_key(values):
    del values["train"]
    with pytest.raises(UserError, match=r"my\.yaml: train is missing"):
        parse_recipe(values, "my.yaml")


def test_a_target_must_change_something(values):
    values["targets"]["width"] = {"method": "minitron-width"}
    with pytest.raises(UserError, match="nothing says how much to remove; give at least one of layers, hidden, ffn"):
        parse_recipe(values, "my.yaml")


def test_recipe_by_path_and_by_name_are_the_same(values, tmp_path):
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(copy.deepcopy(values)))
    assert load_recipe(str(path)) == load_recipe("smollm2_135m/demo")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_not_a_recipe(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a\ntrain: {tokens: 1}\ntrain: {tokens: 2}\n", "train is given twice in"),
        ("targets:\n  a: {method: dense}\n  a: {method: flap}\n", "a is given twice in"),
        ("name: &n {a: [*n]}\n", "n contains itself in"),
    ],
)
def test_what_yaml_would_drop_or_repeat_for_ever_is_refused(tmp_path, text, sentence):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_recipe(tmp_path / "r.yaml")


def test_anchors_and_merged_keys_are_understood(tmp_path):
    """Also where what is merged is in a deeper block, which YAML reads later, and merges keys itself."""
    (tmp_path / "r.yaml").write_text("x: {b: &b {<<: &a {p: 1, q: 1}, p: 2}}\nc: {<<: *b, r: 3}\nd: *a\n")
    expected = {"x": {"b": {"p": 2, "q": 1}}, "c": {"p": 2, "q": 1, "r": 3}, "d": {"p": 1, "q": 1}}
    assert read_yaml(tmp_path / "r.yaml", StrictLoader) == expected


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match="smollm2_135m/demo"):
        load_recipe("smollm2/demo")


def test_steps_are_rounded_up_and_tokens_are_exact(values):
    values["train"] |= {"tokens": 100, "sequence_length": 8, "global_batch_size": 4, "validation_samples": 4}
    train = parse_recipe(values, "test").train
    assert (train.tokens_per_step, train.steps) == (32, 4)


def _recipe(values: dict, **changes) -> Recipe:
    return parse_recipe({**values, **changes}, "test")


def test_every_method_and_each_of_its_options_is_a_key_of_a_target():
    fields = Target.model_fields
    assert set(get_args(fields["method"].annotation)) == {*methods(), DENSE}
    for name, method in methods().items():
        assert fields.keys() >= method.options.model_fields.keys(), name


def test_options_have_the_defaults_of_the_algorithms():
    """Each is declared with its method; a function that is called from Python has the same default."""
    plans = {
        "flap": plan_flap,
        "wanda-sp": plan_wanda_sp,
        "magnitude-sp": plan_magnitude_sp,
        "llm-pruner": plan_llm_pruner,
        "shortgpt": plan_shortgpt,
        "minitron-width": plan_width,
        "minitron-joint": plan_joint,
        "adapt-pruner": AdaptPrunerSettings,
        "sparsegpt": SparseGPT,
        "magnitude": MagnitudeSource,
    }
    for name, plan in plans.items():
        options = method_named(name).options.model_fields
        shared = options.keys() & inspect.signature(plan).parameters.keys() - {"ratio", "sparsity"}
        assert shared, name
        for option in shared:
            assert options[option].default == inspect.signature(plan).parameters[option].default, (name, option)


def test_a_sparsity_that_yaml_takes_for_a_time_is_understood():
    text = "{method: wanda, sparsity: 2:4}"
    assert yaml.safe_load(text)["sparsity"] == 124
    assert Target.model_validate(yaml.safe_load(text)).options == {"sparsity": "2:4"}
    assert Target(method="wanda", sparsity=0.5).options == {"sparsity": "0.5"}


def test_a_recipe_extends_another(tmp_path):
    base = load_recipe("smollm2_135m/demo").model_dump(exclude_none=True)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "between.yaml").write_text("extends: base.yaml\ntrain: {learning_rate: 0.5}\n")
    (tmp_path / "my.yaml").write_text(
        "extends: between.yaml\nname: mine\ntargets: {width: null, more: {method: shortgpt, layers: 7}}\n"
    )
    recipe = load_recipe(str(tmp_path / "my.yaml"))
    assert (recipe.name, recipe.train.learning_rate, recipe.train.tokens) == ("mine", 0.5, 49152)
    assert list(recipe.targets) == ["depth", "more"]
    (tmp_path / "named.yaml").write_text("extends: paper_in_small/quick\nevaluate: {texts: null}\n")
    quick, named = load_recipe("paper_in_small/quick"), load_recipe(str(tmp_path / "named.yaml"))
    assert quick.evaluate.texts
    assert not named.evaluate.texts
    assert (named.targets, named.parent) == (quick.targets, quick.parent)
    (tmp_path / "base.yaml").write_text("extends: my.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        load_recipe(str(tmp_path / "my.yaml"))
    (tmp_path / "base.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml extends .*nowhere\.yaml, which does not exist"):
        load_recipe(str(tmp_path / "my.yaml"))


def test_budgets_rates_and_ranges_make_the_runs(values):
    del values["train"]["tokens"]
    values["targets"]["depth"]["learning_rate"] = {"pruned": 0.25, "random": 0.5}
    values["data"]["token_ranges"] = {"parent": [0, 5000], "pruned": [5000, 15000]}
    recipe = _recipe(values, budgets={"pruned": [1000, 4097], "random": [8e3]})
    assert [(run.name, run.training.tokens, run.tokens, run.first_token, run.training.learning_rate)
            for run in recipe.runs] == [
        ("width-pruned-1k", 1000, 2048, 6144, 1e-3),
        ("width-pruned-4097", 4097, 3 * 2048, 6144, 1e-3),
        ("width-random-8k", 8000, 4 * 2048, 0, 1e-3),
        ("depth-pruned-1k", 1000, 2048, 6144, 0.25),
        ("depth-pruned-4097", 4097, 3 * 2048, 6144, 0.25),
        ("depth-random-8k", 8000, 4 * 2048, 0, 0.5),
    ]  # fmt: skip


def test_a_setting_in_place_of_a_number(values):
    short = _recipe(values, budget="equal-total-tokens")
    assert short == _recipe(values, budgets={"pruned": [49152], "random": ["equal-total-tokens"]})
    assert parse_recipe(short.model_dump(), "again") == short
    assert [name for name, _, _ in short.matched_runs("depth")] == ["depth-random-equal-total-tokens"]
    with pytest.raises(UserError, match=r"width-random-equal-total-tokens .* depends on the cost of pruning"):
        _ = short.runs
    several = _recipe(values, budgets={"pruned": [2048, 4096], "random": ["equal-training-tokens", 2048]})
    matched = {name: arm.tokens for name, _, arm in several.matched_runs("width")}
    assert matched == {
        "width-random-equal-training-tokens-2048": 2048,
        "width-random-equal-training-tokens-4096": 4096,
    }
    known = several.settled(
        {name: 10 * tokens for name, tokens in matched.items()} | dict.fromkeys(_depth(several), 1)
    )
    assert [(run.name, run.tokens, run.setting) for run in known.runs if run.target == "width"][2:] == [
        ("width-random-equal-training-tokens-2048", 20480, "equal-training-tokens"),
        ("width-random-equal-training-tokens-4096", 40960, "equal-training-tokens"),
        ("width-random-2048", 2048, None),
    ]
    values["data"]["token_ranges"] = {"random": [0, 5000]}
    with pytest.raises(
        UserError, match=r"a budget of 5,001 tokens for random arms goes past the end .* \(0 to 5,000\)"
    ):
        _recipe(values, budget="equal-total-tokens").settled({"width-random-equal-total-tokens": 5001})
    with pytest.raises(UserError, match="budget and budgets set the same thing"):
        _recipe(values, budget="equal-total-tokens", budgets=[1000])


def _depth(recipe: Recipe) -> list[str]:
    return [name for name, _, _ in recipe.matched_runs("depth")]


def test_the_order_of_the_data_has_a_seed_of_its_own(values):
    """Which leaves the identity of recipes that do not give one as it was."""
    plain = _recipe(values).train
    assert "data_seed" not in plain.identity
    assert plain.order_seed == plain.seed == 1234
    values["train"]["data_seed"] = 1234
    assert _recipe(values).train.identity == plain.identity, "saying the default makes another run of it"
    values["train"]["seed"] = 7
    other = _recipe(values).train
    assert (other.seed, other.order_seed, other.identity["data_seed"]) == (7, 1234, 1234)
    assert tokens_read("a" * 64, other, 0) == tokens_read("a" * 64, plain, 0)


def test_what_the_parent_was_trained_on_need_not_be_said_twice(values):
    """The range of the parent is as many tokens as a run of the same steps trains on; a declaration comes first."""
    values["parent"].pop("pretraining_tokens", None)
    assert _recipe(values).parent_tokens is None
    step = _recipe(values).train.tokens_per_step
    values["data"]["token_ranges"] = {"parent": [step, 4 * step + 1], "pruned": [8 * step, 1e9]}
    assert _recipe(values).parent_tokens == 4 * step
    values["parent"]["pretraining_tokens"] = 5
    assert _recipe(values).parent_tokens == 5


def test_an_overlap_with_the_parent_must_be_declared(values):
    values["data"]["token_ranges"] = {"parent": [0, 1e6], "allow_overlap": True}
    assert _recipe(values).runs[0].first_token == 0


def test_one_layout_for_all_targets_that_have_none(values):
    del values["targets"]["depth"]["layout"]
    recipe = _recipe(values, layout={"data_parallel": 4})
    assert recipe.targets["depth"].layout.data_parallel == 4
    assert recipe.targets["width"].layout.tensor_parallel == 2
    assert recipe.targets["width"].layout.data_parallel == 1


def test_a_parent_that_is_yet_to_be_trained_cannot_be_pruned(values):
    values["parent"] |= {"source": None, "tokenizer": "here"}
    with pytest.raises(UserError, match="parent has no source, so it can only be trained"):
        _recipe(values)
    assert _recipe(values, targets={"p": {"method": "dense"}}, arms=["random"]).runs[0].name == "p-random"


@pytest.mark.parametrize(
    ("train", "blend"),
    [
        ("a", (None, ["a"])),
        (["a", "b"], (None, ["a", "b"])),
        (["0.7", "a", "0.3", "b"], ([0.7, 0.3], ["a", "b"])),
        (["0.7", "a", "0.3"], None),
        (["a", "0.3"], None),
        ([], None),
    ],
)
def test_blends(train, blend):
    values = {"train": train, "validation": "v", "calibration": "c", "test": "t"}
    if blend is None:
        with pytest.raises(ValueError, match="weights and paths in alternation"):
            TokenFiles.model_validate(values)
    else:
        assert TokenFiles.model_validate(values).blend == blend


def test_the_readme_describes_every_key():
    text = (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
    blocks = [block for block in RecipeBlock.__subclasses__() if block.__module__.startswith("nemo_pvs.recipe.")]
    keys = {key for block in blocks for key in block.model_fields}
    assert {"title", "micro_batch_size", "allow_overlap"} <= keys
    assert not {key for key in keys if not re.search(rf"\b{key}\b", text)}
    assert not {name for name in packaged_recipes() if name.split("/")[1] not in text}


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    packaged = load_recipe("smollm2_135m/demo")
    text = yaml.safe_dump(packaged.model_dump(), sort_keys=False)
    (tmp_path / "recipe.yaml").write_text("\ufeff" + text, encoding="utf-8")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == packaged


def test_budgets_are_counted_in_steps_as_the_paper_labels_them(values):
    """The steps that scripts/run/env.sh of zlab-princeton/pruning-vs-scratch names."""
    published = {"10B": 2500, "30B": 7500, "50B": 12_500, "250B": 62_500, "500B": 125_000}
    budgets = [10e9, 30e9, 50e9, 250e9, 500e9]
    for sequence, batch in ((8192, 512), (4096, 1024)):
        train = {"sequence_length": sequence, "global_batch_size": batch, "validation_samples": batch}
        train = {**values["train"], **train, "paper_steps": True}
        recipe = _recipe(values, train=train, budgets=budgets, arms=["pruned"])
        runs = {arm.name.removeprefix("width-pruned-"): arm for arm in recipe.runs if arm.target == "width"}
        assert {label: arm.training.steps for label, arm in runs.items()} == published
        assert runs["50B"].tokens == 12_500 * 4_194_304, "tokens that are seen"
    # Steps of another size see as many tokens, to the nearest step; only labels know of it.
    tiny = _recipe(values, train={**values["train"], "paper_steps": True}, budgets=[10e6], arms=["pruned"])
    assert (tiny.runs[0].name, tiny.runs[0].tokens) == ("width-pruned-10M", 10_485_760)
    assert not tiny.runs[0].training.paper_steps
    assert _recipe(values, budgets=[10e6]).runs[0].tokens == -(-10_000_000 // 2048) * 2048


def test_ranges_and_settings_count_the_tokens_that_are_seen(values):
    train = {**values["train"], "paper_steps": True}
    ranges = {"token_ranges": {"pruned": [0, 10e6]}}
    with pytest.raises(UserError, match=r"a budget of 10,485,760 tokens for pruned arms goes past the end"):
        _recipe(values, train=train, budgets=[10e6], arms=["pruned"], data={**values["data"], **ranges})
    budgets = {"pruned": [1e6, 10e6], "random": ["equal-training-tokens"]}
    recipe = _recipe(values, train=train, budgets=budgets)
    matched = {name: arm.tokens for name, _, arm in recipe.matched_runs("width")}
    assert matched == {
        "width-random-equal-training-tokens-1M": 1_048_576,
        "width-random-equal-training-tokens-10M": 10_485_760,
    }
    settled = recipe.settled(matched | dict.fromkeys(_depth(recipe), 1))
    random = [arm.tokens for arm in settled.runs if (arm.target, arm.initialisation) == ("width", "random")]
    assert random == [1_048_576, 10_485_760], "a budget that was worked out is not scaled again"


def test_initialisation_is_part_of_random_weights_alone(values):
    plain, drawn = (
        _recipe(values, train={**values["train"], **given}).train for given in ({}, {"initialisation": "maxtext"})
    )
    assert plain.identity == drawn.identity, "a pruned arm does not depend on it"
    assert "initialisation" not in plain.model_dump()
    assert "paper_steps" not in plain.model_dump()
    assert drawn.model_dump()["initialisation"] == "maxtext"
