"""A recipe with a parent to train, rates to choose and two seeds, run whole and compared with its runs by hand."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import nemo_pvs as pvs
from nemo_pvs.cluster.experiment import stages
from nemo_pvs.cluster.profile import load_profile
from nemo_pvs.data.shards import tokenize_files
from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.series import RunSeries
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.reporting.compare.compare import compare, read_runs
from nemo_pvs.reporting.results import ParentResult, Results
from nemo_pvs.training import trainer
from nemo_pvs.training.job import TrainingJob
from tests.conftest import save_tiny_tokenizer, tiny_llama_config
from tests.megatron.launcher import ForkedLauncher
from tests.pipeline.test_pipeline import tiny_values

STEP = 4 * 32

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def write_recipes(folder: Path) -> Path:
    """Write a parent's recipe and one that names it: a sweep for pruned arms, a rate for random ones, two seeds."""
    given = tiny_values(folder)
    tokenizer = save_tiny_tokenizer(folder / "tokenizer")
    split = {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}
    tokenize_files([given["data"]["source"]], tokenizer, folder / "tokens", split)
    data = {
        "token_files": {name: str(folder / "tokens" / name) for name in split},
        "token_ranges": {"parent": [0, 6 * STEP], "pruned": [6 * STEP, 64 * STEP], "random": [0, 64 * STEP]},
    }
    train = {**given["train"], "validations": 2, "learning_rate": 1e-2}
    del train["tokens"]
    evaluate = {"samples": 4, "sequence_length": 32}
    config = json.loads(tiny_llama_config(tie_word_embeddings=True, num_hidden_layers=3).to_json_string())
    parent = {
        "name": "parent",
        "title": "The parent",
        "parent": {"config": config, "tokenizer": str(tokenizer)},
        "data": data,
        "targets": {"parent": {"method": "dense"}},
        "arms": ["random"],
        "budgets": [6 * STEP],
        "train": train,
        "evaluate": evaluate,
    }
    grid = {
        "name": "grid",
        "title": "The grid",
        "seeds": [1, 2],
        "parent": {"recipe": "parent.yaml"},
        "data": data,
        "calibrate": given["calibrate"],
        "targets": {
            "width": {
                "method": "minitron-width",
                "ffn": 48,
                "learning_rate": {"pruned": {"sweep": [1e-2, 1e-5], "tokens": 2 * STEP}, "random": 1e-2},
            }
        },
        "budgets": [4 * STEP],
        "train": train,
        "evaluate": evaluate,
    }
    grid["evaluate"] = {**evaluate, "texts": {"again": str(folder / "tokens" / "test")}}
    for name, values in (("parent", parent), ("grid", grid)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder / "grid.yaml"


@pytest.fixture(autouse=True, scope="module")
def forked_launcher() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_launch", ForkedLauncher)
        yield


@pytest.fixture(name="done", scope="module")
def done_fixture(tmp_path_factory: pytest.TempPathFactory, forked_launcher: None) -> tuple[Path, Results]:
    """A folder with recipes and the finished run ``runs/grid``, and what the run returned."""
    folder = tmp_path_factory.mktemp("series")
    recipe = write_recipes(folder)
    return folder, pvs.run(recipe, folder / "runs" / "grid")


def _losses(results: Results) -> dict[str, list[float]]:
    return {arm.name: [point.loss for point in arm.validation] for arm in results.arms}


def test_a_seed_is_what_its_recipes_are_when_run_by_hand(done: tuple[Path, Results], tmp_path: Path) -> None:
    folder, _ = done
    seed_2 = Results.load(folder / "runs" / "grid" / "seed-2" / "results.json")
    parent = {**yaml.safe_load((folder / "parent.yaml").read_text())}
    parent["train"]["seed"] = 2
    (tmp_path / "parent.yaml").write_text(yaml.safe_dump(parent))
    pvs.run(tmp_path / "parent.yaml", tmp_path / "parent")
    grid = {**yaml.safe_load((folder / "grid.yaml").read_text())}
    del grid["seeds"]
    grid["parent"] = {"source": str(tmp_path / "parent" / "models" / f"parent-random-{6 * STEP}")}
    grid["targets"]["width"]["learning_rate"] = {"pruned": 1e-2, "random": 1e-2}
    grid["train"]["seed"] = 2
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    by_hand = pvs.run(tmp_path / "grid.yaml", tmp_path / "grid")
    assert _losses(by_hand) == _losses(seed_2)
    assert by_hand.hashes == seed_2.hashes
    # Made on its own, it belongs to the other seeds all the same: its parent differs from theirs by the seed alone.
    together = pvs.report([folder / "runs" / "grid" / "seed-1", tmp_path / "grid"], tmp_path / "report")
    assert together.seeds == 2


def test_the_rate_is_chosen_by_loss_and_charged_to_the_comparison(done: tuple[Path, Results]) -> None:
    folder, _ = done
    for seed in (1, 2):
        run = Results.load(folder / "runs" / "grid" / f"seed-{seed}" / "results.json")
        (sweep,) = run.sweeps
        assert (sweep.kind, sweep.targets, sweep.rates, sweep.chosen) == ("pruned", ["width"], [1e-5, 1e-2], 1e-2)
        assert sweep.losses[1] < sweep.losses[0]
        assert sweep.at_the_edge
        assert sweep.tokens == 2 * 2 * STEP
        # An arm pays for itself, and for its parent.
        (pruned,) = [arm for arm in run.arms if arm.initialisation == "pruned"]
        assert pruned.ledger.training.tokens == 4 * STEP
        assert pruned.ledger.total.tokens == (6 + 4) * STEP + 8 * 32
    tried = Results.load(folder / "runs" / "grid" / "sweep" / "results.json")
    assert tried.recipe["train"]["seed"] == 1


def test_the_report_is_the_mean_of_the_seeds(done: tuple[Path, Results]) -> None:
    folder, results = done
    runs = read_runs([str(folder / "runs" / "grid")])
    assert [(run.seed, run.data_seed) for run in runs] == [(1, 1), (2, 2)]
    for arm in results.arms:
        losses = [
            repeated.validation_loss for run in runs for repeated in run.results.arms if repeated.name == arm.name
        ]
        assert len(set(losses)) == 2
        assert arm.validation_loss == pytest.approx(sum(losses) / 2)
    assert (folder / "runs" / "grid" / "report.html").is_file()


def test_the_loss_on_a_further_text_is_that_of_its_tokens(done: tuple[Path, Results]) -> None:
    """Here they are those of the test split."""
    _, results = done
    (seed_1, _) = read_runs([str(done[0] / "runs" / "grid")])
    for model in (seed_1.results.parent, *seed_1.results.arms):
        assert model is not None
        perplexity = model.test_perplexity if isinstance(model, ParentResult) else model.test_perplexity_after
        assert perplexity is not None
        assert model.text_losses["again"] == pytest.approx(math.log(perplexity), abs=1e-6)
    assert results.arms[0].text_losses.keys() == {"again"}


def test_a_second_call_and_another_recipe_find_what_is_done(done: tuple[Path, Results]) -> None:
    folder, results = done
    models = sorted((folder / "runs").glob("**/model*.safetensors"))
    times = [os.stat(model).st_mtime_ns for model in models]
    assert _losses(pvs.run(folder / "grid.yaml", folder / "runs" / "grid")) == _losses(results)
    values = yaml.safe_load((folder / "grid.yaml").read_text())
    values |= {"name": "other", "targets": {"depth": {"method": "minitron-depth", "layers": 2}}, "arms": ["random"]}
    values["targets"]["depth"]["learning_rate"] = 1e-2
    (folder / "other.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    prepared = RunSeries(load_recipe(folder / "other.yaml"), folder / "runs" / "other").prepare_only()
    assert {job.parents[2].name for job in prepared} == {"seed-1", "seed-2"}  # no parent is to be trained
    assert [os.stat(model).st_mtime_ns for model in models] == times


def test_a_launcher_is_told_of_each_phase_in_turn(done: tuple[Path, Results], tmp_path: Path) -> None:
    """What ``--prepare-only`` asks to be trained is what ``--launch`` has planned, parents first."""
    folder, _ = done
    recipe, out = load_recipe(folder / "grid.yaml"), tmp_path / "runs" / "grid"
    planned = stages(recipe, str(folder / "grid.yaml"), out, load_profile("local_cpu"))
    jobs = [command.arguments[-1] for command in planned if command.module == "nemo_pvs.megatron.launch"]
    first = [str(job) for job in RunSeries(recipe, out).prepare_only()]
    assert first == jobs[:2]
    for job in first:
        TrainingJob.load(Path(job))  # can be trained
    assert [command.name for command in planned if "prepare" in command.name][-2:] == ["sweep-prepare", "prepare"]
    assert len(jobs) == len(set(jobs)) == 2 + 2 + 2 * 2


def test_what_is_finished_so_far_is_reported_and_the_rest_is_named(done: tuple[Path, Results], tmp_path: Path) -> None:
    """A seed lacks one arm's last checkpoint, another has not begun."""
    folder, results = done
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    recipe, run = tmp_path / "copy" / "grid.yaml", tmp_path / "copy" / "runs" / "grid"
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "seeds": [1, 2, 3]}, sort_keys=False))
    name = f"width-random-{4 * STEP}"
    shutil.rmtree(run / "seed-2" / "train" / name)
    shutil.rmtree(run / "seed-2" / "models" / name)
    (run / "seed-2" / "results.json").unlink()
    so_far = pvs.run(recipe, run, so_far=True)
    assert _losses(so_far)["width, pruned, 512"] == _losses(results)["width, pruned, 512"]
    runs = compare(read_runs([str(run)]))
    assert [len(seed.results.arms) for seed in runs.runs] == [2, 1]
    assert runs.runs[1].results.unfinished == ["width, random, 512"]
    assert any("“width, random, 512” in" in warning for warning in runs.warnings)
    assert not any(finding.judgement == "holds" for finding in runs.findings)
    assert "seed-3, not trained yet" in (run / "report.html").read_text()
    assert not (run / "seed-2" / "train" / name).exists()
    assert not (run / "seed-3").exists()


def test_nothing_finished_is_nothing_to_report(done: tuple[Path, Results], tmp_path: Path) -> None:
    folder, _ = done
    with pytest.raises(UserError, match=r"No training in .*parent.* is finished yet; continue pvs run first"):
        pvs.run(folder / "grid.yaml", tmp_path / "runs" / "grid", so_far=True)
