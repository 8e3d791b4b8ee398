"""Domains in a recipe: what they need to be loaded dynamically, what is refused before any work, and their files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.planning.dry_run import describe_domains, dry_run
from nemo_pvs.recipe.load import load_recipe, parse_recipe
from nemo_pvs.training.job import Loading, TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

LOADING = {"proportions": {"song": 0.8, "noise": 0.2}, "target_losses": {"song": 2.0, "noise": 3.0}}
FITTED = [{"parameters": size, "losses": {"song": 1 + 1 / size, "noise": 2 + 3 / size}} for size in (1.0, 2.0, 4.0)]


def _values() -> dict[str, Any]:
    values = load_recipe("smollm2_135m/sheared").model_dump()
    values["data"]["source"] = {"song": "song.txt", "noise": "noise.txt"}
    values["train"]["dynamic_loading"] = copy.deepcopy(LOADING)
    return values


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *blocks, key = path.split(".")
    for name in blocks:
        values = values[name]
    values[key] = value


def test_loading_is_shared_by_all_trainings_unless_masks_have_their_own() -> None:
    values = _values()
    recipe = parse_recipe(values, "test")
    assert recipe.data.domains == ["song", "noise"]
    assert all(arm.training.dynamic_loading == recipe.train.dynamic_loading for arm in recipe.runs)
    assert "dynamic_loading" in recipe.train.identity
    assert "dynamic_loading" not in load_recipe("smollm2_135m/sheared").train.identity, "older runs would be others"
    _set(values, "train.dynamic_loading.proportions", {"song": 0.679, "noise": 0.32})
    assert sum(parse_recipe(values, "test").train.dynamic_loading.shares.values()) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("data.source", "song.txt", "train.dynamic_loading needs domains, and data has none"),
        ("train.dynamic_loading", None, r"data has domains \(song, noise\), but nothing sets their shares"),
        ("data.source", {"song/s": "a"}, "string should match pattern"),
        ("data.token_ranges", {"random": [0, 10]}, "token_ranges does not apply to text with domains"),
        ("targets.sheared.learn.first_token", 64, "first_token does not apply to text with domains"),
        ("targets.width.stages", 2, "rounds of pruning do not work with text in domains"),
        ("train.dynamic_loading.proportions", {"song": 1.0}, r"proportions: noise is missing, .* are song, noise"),
        ("train.dynamic_loading.proportions", {"song": 0.5, "mail": 0.5}, "proportions: mail is no domain of data"),
        ("train.dynamic_loading.proportions", {"song": 1.0, "noise": 0.0}, "proportions.noise: input should be great"),
        ("train.dynamic_loading.proportions", {"song": 0.8, "noise": 0.1}, "the proportions add up to 0.9, not to 1"),
        ("train.dynamic_loading.proportions", None, "proportions is missing, which sheared needs"),
        ("train.dynamic_loading.target_losses", {"song": 2.0}, "target_losses: noise is missing"),
        ("train.dynamic_loading.target_losses", None, "give either target_losses or fitted"),
        ("train.dynamic_loading.fitted", FITTED, "give either target_losses or fitted"),
        ("train.dynamic_loading", {**LOADING, "target_losses": None, "fitted": FITTED[:2]}, "three or more models"),
        ("train.dynamic_loading.kind", "constant", "constant shares need no target_losses"),
        ("train.dynamic_loading.smothing", 1, "did you mean smoothing"),
        (
            "targets.sheared.learn.dynamic_loading",
            {**LOADING, "proportions": {"song": 1}},
            "learn.dynamic_loading.pro",
        ),
    ],
)
def test_what_cannot_be_loaded_gets_one_sentence(path: str, value: Any, sentence: str) -> None:
    values = _values()
    _set(values, path, value)
    with pytest.raises(UserError, match=sentence):
        parse_recipe(values, "test")


def test_only_arms_behind_masks_begin_with_shares_that_nobody_gave() -> None:
    values = _values()
    values["targets"]["sheared"]["learn"]["dynamic_loading"] = LOADING
    del values["train"]["dynamic_loading"]["proportions"]
    with pytest.raises(UserError, match="proportions is missing, which arms of sheared need"):
        parse_recipe(values, "test")
    values["arms"] = ["pruned"]
    with pytest.raises(UserError, match="proportions is missing, which arms of width need"):
        parse_recipe(values, "test")
    del values["targets"]["width"]
    assert parse_recipe(values, "test").train.dynamic_loading.shares == {}  # type: ignore[union-attr]


def test_losses_of_other_sizes_are_fitted_to_the_target() -> None:
    values = _values()
    values["train"]["dynamic_loading"] = {"proportions": LOADING["proportions"], "fitted": FITTED}
    how = parse_recipe(values, "test").train.dynamic_loading
    assert how is not None
    assert how.targets(["noise", "song"], 8.0) == pytest.approx([2 + 3 / 8, 1 + 1 / 8], abs=1e-3)
    assert "target losses of sheared: song 1.1250, noise 2.3750" in describe_domains(
        parse_recipe(values, "test"), {"sheared": 8}
    )


@pytest.mark.parametrize(
    ("available", "kind", "sentence"),
    [
        ({"song": 900, "noise": 90}, "doremi", "reads 1,000 tokens, but all domains together have 990"),
        ({"song": 700, "noise": 700}, "constant", r"about 800 tokens of domain song \(share 0.8\), but it has 700"),
        ({"song": 70, "noise": 7000}, "doremi", "about 80 tokens of domain song"),
        ({"song": 700, "noise": 700}, "doremi", None),
    ],
)
def test_a_domain_that_is_certainly_too_short_is_refused(
    available: dict[str, int], kind: str, sentence: str | None
) -> None:
    values = _values()
    values["train"]["dynamic_loading"] |= {"kind": kind} if kind == "doremi" else {"kind": kind, "target_losses": None}
    how = parse_recipe(values, "test").train.dynamic_loading
    assert how is not None
    if sentence is None:
        how.check_enough(available, 1000, known=100)
        return
    with pytest.raises(UserError, match=sentence):
        how.check_enough(available, 1000, known=100)


def test_token_files_by_domain_are_complete() -> None:
    values = _values()
    files = {"train": {"song": "a", "noise": "b"}, "validation": {"song": "c"}, "calibration": "d", "test": "e"}
    values["data"] |= {"source": None, "token_files": files}
    with pytest.raises(UserError, match="domain noise has no validation file"):
        parse_recipe(values, "test")
    files["validation"] = {"song": "c", "noise": "f"}
    assert parse_recipe(values, "test").data.domains == ["song", "noise"]


def test_the_published_setting_is_a_recipe() -> None:
    plan = dry_run(load_recipe("sheared_llama/llama2_7b"))
    (arms, masks) = (plan.recipe.train.dynamic_loading, plan.recipe.targets["2.7b"].learn)
    assert masks is not None
    assert masks.dynamic_loading is not None
    assert list(masks.dynamic_loading.shares) == ["cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4"]
    assert arms is not None
    assert arms.shares == {}, "arms do not go on where masks ended"
    (width,) = plan.targets
    assert width.expected.shape.parameters == 2_701_560_320
    (arm,) = plan.arms
    assert (arm.arm.training.steps, arm.arm.tokens) == (48_000, 48_000 * 256 * 4096)
    assert arm.arm.training.steps // arm.arm.training.validations == 400


@pytest.mark.slow
def test_a_run_on_domains_tokenises_each_and_begins_with_their_shares(tmp_path: Path) -> None:
    parent = save_tiny_tokenizer(make_tiny_llama(tmp_path / "parent", tie_word_embeddings=True))
    for name, step in (("song", 7), ("noise", 31)):
        texts = [" ".join(f"w{2 + (n + step * i) % 126}" for i in range(300)) for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values = _values()
    values["parent"] = {"source": str(parent)}
    values["data"]["source"] = {name: str(tmp_path / f"{name}.jsonl") for name in ("song", "noise")}
    values["calibrate"] = values["evaluate"] = {"samples": 4, "sequence_length": 16}
    values["targets"] = {"depth": {"method": "minitron-depth", "layers": 2}}
    values["train"] |= {"tokens": 512, "sequence_length": 16, "validation_samples": 8, "micro_batch_size": 1}
    pipeline = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    pruned, random = (TrainingJob.load(path) for path in pipeline.prepare_only())
    assert pruned.loading == random.loading == Loading(LOADING["proportions"], {"song": 0, "noise": 0})
    assert pruned.data == random.data
    for split, names in pruned.data.items():
        assert list(names) == ["song", "noise"], split
        assert all(Path(f"{prefix}.bin").is_file() for prefix in names.values())
    windows = pipeline.tokens.validation_windows.ids
    assert windows.shape == (16, 17)
    assert not (windows[:8] == windows[8:]).all()
    assert pipeline.reads(pipeline.recipe.runs[0]) is None, "domains have no one range"
    values["data"]["source"]["noise"] = str(tmp_path / "few.jsonl")
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "w3 w4"}))
    with pytest.raises(UserError, match="Domain noise: 1 different document"):
        Pipeline(parse_recipe(values, "test"), tmp_path / "other").prepare()
