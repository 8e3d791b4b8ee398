"""A run that would remove what took long is refused before it has changed anything."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.look_ahead import LookAhead, look_ahead
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.records import PrunedRecord, Record
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.recipe.load import parse_recipe
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.pipeline.test_pipeline import _token_files, tiny_values

pytestmark = pytest.mark.slow  # in sum: each makes a whole run


def _snapshot(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _pipeline(values: dict, folder: Path, *force: str) -> Pipeline:
    return Pipeline(parse_recipe(values, "test"), folder, force=force)


@pytest.fixture(name="values")
def values_fixture(tmp_path: Path) -> dict:
    return _values(tmp_path)


@pytest.fixture(name="run")
def run_fixture(values: dict, tmp_path: Path) -> Path:
    """Return a run folder with all initial weights, and with a checkpoint of every arm."""
    return _begun(values, tmp_path / "run")


@pytest.fixture(name="untouched", scope="module")
def untouched_fixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """Return the recipe and the run folder that tests share because a refusal must not change it."""
    folder = tmp_path_factory.mktemp("untouched")
    values = _values(folder)
    return values, _begun(values, folder / "run")


def _values(folder: Path) -> dict:
    values = tiny_values(folder)
    values["targets"]["sparse"] = {"method": "wanda", "sparsity": "2:4"}
    return values


def _begun(values: dict, folder: Path) -> Path:
    pipeline = _pipeline(values, folder)
    for job in pipeline.prepare_only():
        checkpoint = job.parent / "nemo" / "checkpoints" / "step=7-last"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text("days of work")
    return folder


def _change(values: dict, path: str, value: object) -> dict:
    changed = copy.deepcopy(values)
    *blocks, key = path.split(".")
    block = changed
    for name in blocks:
        block = block.setdefault(name, {})
    block[key] = value
    return changed


def _refused(values: dict, run: Path, sentence: str, *force: str) -> None:
    before = _snapshot(run)
    for begin in (Pipeline.prepare_only, Pipeline.prepare):
        with pytest.raises(UserError, match=sentence):
            begin(_pipeline(values, run, *force))
    assert _snapshot(run) == before, "the folder was changed before the refusal"


CHANGES = [
    (
        "targets.width.ffn",
        64,
        r"train/width-pruned/.* was made with .* \(in prune/width\).*--force train/width-pruned",
    ),
    ("targets.depth.layers", 3, "train/depth-pruned"),
    ("parent.source", "hf://must/be-fetched", r"train/width-pruned/.* \(in parent\)"),
    ("targets.sparse.sparsity", "4:8", r"options.sparsity 2:4, not 4:8 \(in prune/sparse\)"),
    ("calibrate.samples", 4, r"settings.samples 8, not 4 \(in calibrate\)"),
    ("calibrate.seed", 1, r"\(in calibrate\)"),
    ("train.learning_rate", 1e-3, "made with training.learning_rate 0.003, not 0.001"),
    ("train.seed", 9, "made with training.seed 1234, not 9"),
    ("train.data_seed", 9, "made with training.data_seed None, not 9"),
    ("train.validation_samples", 4, "train/width-pruned"),
    ("train.sequence_length", 16, "train/width-pruned"),
    ("data.seed", 3, r"source.seed 0, not 3 \(in data\)"),
    ("data.split", {"train": 0.6, "validation": 0.2, "calibration": 0.1, "test": 0.1}, r"\(in data\)"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), CHANGES, ids=[path for path, _, _ in CHANGES])
def test_another_recipe_is_refused_before_it_changes_anything(untouched, path, value, sentence):
    values, run = untouched
    changed = _change(values, path, value)
    # A target that is new, and comes first, is not made either.
    new = {"method": "shortgpt", "layers": 3, "layout": {}}
    changed["targets"] = {"new": new, **changed["targets"]}
    if path == "targets.depth.layers":
        changed["targets"]["depth"]["layout"] = {}
    _refused(changed, run, sentence)


def test_another_parent_is_refused_before_it_changes_anything(untouched, tmp_path):
    values, run = untouched
    other = save_tiny_tokenizer(make_tiny_llama(tmp_path / "other", seed=1, tie_word_embeddings=True))
    _refused(_change(values, "parent.source", str(other)), run, r"train/width-pruned/.* was made with another parent")


def test_a_parent_that_is_retrained_in_its_place_is_refused(values, run, tmp_path):
    make_tiny_llama(Path(values["parent"]["source"]), seed=1, tie_word_embeddings=True)
    _refused(values, run, r"train/width-pruned/.* was made with another parent")


def test_other_text_is_refused_before_it_is_tokenised(values, run):
    with open(values["data"]["source"], "a") as corpus:
        corpus.write('\n{"text": "w2 w3 w4"}')
    _refused(values, run, r"train/width-pruned/.* \(in data\)")


def test_other_token_files_are_refused(values, tmp_path):
    values = _token_files(values, tmp_path / "tokens")
    run = _begun(values, tmp_path / "run")
    with open(values["data"]["token_files"]["train"] + ".json") as file:
        manifest = file.read()
    hash_ = manifest.split('"bin_sha256": "')[1][:64]
    Path(values["data"]["token_files"]["train"] + ".json").write_text(manifest.replace(hash_, "f" * 64))
    _refused(values, run, "train/width-pruned/.* was made with another text")


def test_another_blend_of_the_same_token_files_is_refused(values, tmp_path):
    values = _token_files(values, tmp_path / "tokens")
    train, other = (values["data"]["token_files"][name] for name in ("train", "validation"))
    values["data"]["token_files"]["train"] = [0.7, train, 0.3, other]
    run = _begun(values, tmp_path / "run")
    changed = _change(values, "data.token_files.train", [0.5, train, 0.5, other])
    _refused(changed, run, r"train/width-pruned/.* was made with blend \[0.7, 0.3\], not \[0.5, 0.5\]")


def test_the_same_text_elsewhere_or_written_again_goes_on(values, run, tmp_path):
    """Nobody knows before it is tokenised that it is the same, so that is done; all that follows stays."""
    before = {name: hash_ for name, hash_ in _snapshot(run).items() if not name.startswith(("stages", "recipe"))}
    corpus = Path(values["data"]["source"])
    os.utime(corpus, (1, 1))
    _pipeline(values, run).prepare_only()
    moved = corpus.rename(tmp_path / "moved.jsonl")
    _pipeline(_change(values, "data.source", str(moved)), run).prepare_only()
    after = _snapshot(run)
    assert {name: after.get(name) for name in before} == before


def test_the_same_parent_elsewhere_goes_on(values, run, tmp_path):
    moved = Path(values["parent"]["source"]).rename(tmp_path / "moved")
    records = {path: path.stat().st_mtime_ns for path in (run / "stages").glob("prune-*.json")}
    _pipeline(_change(values, "parent.source", str(moved)), run).prepare_only()
    assert {path: path.stat().st_mtime_ns for path in records} == records


def test_what_is_forced_is_removed_and_nothing_else(values, run):
    changed = _change(values, "targets.width.ffn", 64)
    _refused(changed, run, "--force train/width-random", "train/width-pruned")
    _pipeline(changed, run, "train/width-pruned", "train/width-random").prepare_only()
    left = {path.parents[3].name for path in (run / "train").rglob("weights")}
    assert left == {"depth-pruned", "depth-random", "sparse-pruned", "sparse-random"}


def test_a_calibration_that_is_forced_changes_nothing(values, run):
    _pipeline(values, run, "calibrate").prepare_only()
    assert len(list((run / "train").rglob("step=7-last"))) == 6


def test_scores_with_gradients_are_measured_apart_from_those_that_targets_were_pruned_by(values, run):
    """A target that needs them changes nothing of the others, whether it is added or removed again."""
    scores = (run / "stages" / "calibrate.json").read_bytes()
    added = _change(values, "targets.taylor", {"method": "llm-pruner", "ratio": 0.3, "arms": ["pruned"]})
    _pipeline(added, run).prepare_only()
    assert len(list((run / "train").rglob("step=7-last"))) == 6
    assert (run / "stages" / "calibrate.json").read_bytes() == scores
    assert (run / "scores-gradients").is_dir()
    _pipeline(values, run).prepare_only()
    assert (run / "stages" / "calibrate.json").read_bytes() == scores


def test_a_target_that_needed_gradients_can_be_removed(values, tmp_path):
    both = _change(values, "targets.taylor", {"method": "llm-pruner", "ratio": 0.3, "arms": ["pruned"]})
    run = _begun(both, tmp_path / "run")
    assert [path.name for path in (run / "stages").glob("calibrate*")] == ["calibrate.json"], "one pass for all"
    _pipeline(values, run).prepare_only()
    assert len(list((run / "train").rglob("step=7-last"))) == 7


def test_random_weights_of_another_rope_are_drawn_again(values, tmp_path):
    """Their shape and seed are the same, but not what they compute."""
    parent = Path(values["parent"]["source"])
    values["parent"] = {"config": json.loads((parent / "config.json").read_text()), "tokenizer": str(parent)}
    values |= {"targets": {"parent": {"method": "dense"}}, "arms": ["random"]}
    run = _begun(values, tmp_path / "run")
    for key, value in (("rope_theta", 500_000.0), ("initializer_range", 0.01)):
        _refused(_change(values, f"parent.config.{key}", value), run, rf"made with constants.{key} .*, not {value}")
    assert len(list((run / "train").rglob("step=7-last"))) == 1


def test_pruned_weights_that_were_removed_are_made_again(values, run):
    """By hand, to save space: the checkpoints are still those of the same weights."""
    import shutil

    shutil.rmtree(run / "pruned")
    shutil.rmtree(run / "random")
    _pipeline(values, run).prepare_only()
    assert len(list((run / "train").rglob("step=7-last"))) == 6


def test_a_change_that_was_interrupted_may_be_taken_back(values, run):
    """What an unfinished attempt was made from says nothing of the checkpoints, which are older."""
    changed = _change(values, "targets.width.ffn", 64)
    pipeline = _pipeline(changed, run)
    before = _snapshot(run / "train")
    stage = Stage(
        name="prune/width",
        record=PrunedRecord,
        inputs=lambda: {"options": "other"},
        work=pytest.fail,
        outputs=[pipeline.pruned("width")],
    )
    assert pipeline.stages.begin(stage)
    _pipeline(values, run).prepare_only()
    assert _snapshot(run / "train") == before


def test_what_is_done_before_training_is_found_by_looking_ahead(values, tmp_path):
    """In the same order, and each with what it has returned."""
    values["targets"] |= {"flap": {"method": "flap", "ratio": 0.3}, "dense": {"method": "dense", "arms": ["random"]}}
    done = _pipeline(values, tmp_path / "run")
    done.prepare()
    found = look_ahead(_pipeline(values, tmp_path / "run"))
    assert list(found) == list(done.records)
    for kind in {type(record) for record in done.records.of(Record).values()}:
        assert found.of(kind) == done.records.of(kind)


def test_every_stage_is_looked_at_before_the_first_is_done(values, tmp_path, monkeypatch):
    learn = {"tokens": 256, "global_batch_size": 4}
    values["targets"] = {
        "masks": {"method": "sheared-llama", "ffn": 48, "learn": learn, "arms": ["pruned"]},
        "depth": {"method": "minitron-depth", "layers": 2, "stages": 2},
        "flap": {"method": "flap", "ratio": 0.3},
    }
    looked: list[str] = []
    look = LookAhead.look

    def noted(ahead, stage):
        looked.append(stage.name)
        look(ahead, stage)

    monkeypatch.setattr(LookAhead, "look", noted)
    look_ahead(_pipeline(values, tmp_path / "run"))
    assert looked == [
        "parent",
        "data",
        "calibrate",
        "prune/flap",
        "random/flap",
        "masks/masks",
        "prune/masks",
        "prune/depth/stage-1",
        "train/depth/stage-1",
        "prune/depth",
        "random/depth",
        "train/masks-pruned",
        "train/depth-pruned",
        "train/depth-random",
        "train/flap-pruned",
        "train/flap-random",
    ]
    assert not (tmp_path / "run").exists()


def test_rounds_of_a_target_are_looked_at(values, tmp_path):
    """The training between them is as precious as the last."""
    values["targets"] = {"width": {"method": "minitron-width", "ffn": 48, "stages": 2, "arms": ["pruned"]}}
    run = tmp_path / "run"
    (job,) = _pipeline(values, run).prepare_only()
    checkpoint = job.parent / "nemo" / "checkpoints" / "step=7-last"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("days of work")
    _refused(_change(values, "targets.width.ffn", 64), run, r"train/width-stages/1/.* \(in prune/width/stage-1\)")
    _refused(_change(values, "train.weight_decay", 0.0), run, r"train/width-stages/1/.* training.weight_decay")
    _pipeline(values, run).prepare_only()
    assert checkpoint.is_dir()


def test_masks_that_were_learned_are_looked_at(values, tmp_path):
    learn = {"tokens": 256, "global_batch_size": 4}
    values["targets"] = {"masks": {"method": "sheared-llama", "ffn": 48, "learn": learn, "arms": ["pruned"]}}
    run = tmp_path / "run"
    (job,) = _pipeline(values, run).prepare_only()
    checkpoint = job.parent / "nemo" / "checkpoints" / "step=1-last"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("a day of work")
    _refused(_change(values, "targets.masks.ffn", 64), run, r"masks/masks/run/.* --force masks/masks")
    _pipeline(values, run).prepare_only()
    assert checkpoint.is_dir()
