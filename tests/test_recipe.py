import copy

import pytest
import yaml

from nemo_pvs.errors import UserError
from nemo_pvs.recipe import load_recipe, packaged_recipes, parse_recipe


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
        ("train.validation_samples", 33, "must be a multiple of global_batch_size"),
        ("data.split.train", 0.9, "must add up to 1"),
        ("targets.width.method", "minitron-with", "targets.width.method"),
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
    with pytest.raises(UserError, match="give at least one of layers, hidden, ffn, kv_groups"):
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


def test_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match="smollm2_135m/demo"):
        load_recipe("smollm2/demo")


def test_steps_are_rounded_up_and_tokens_are_exact(values):
    values["train"] |= {"tokens": 100, "sequence_length": 8, "global_batch_size": 4, "validation_samples": 4}
    train = parse_recipe(values, "test").train
    assert (train.tokens_per_step, train.steps) == (32, 4)
