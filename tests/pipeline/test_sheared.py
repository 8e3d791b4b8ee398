"""The masks stage: what a recipe may ask of it, what it is charged, and a run that is killed in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.domain_order import DomainOrder
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.pipeline.folder import at_the_end
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.stages.learned import complete_job
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.equal_terms import arm_cost
from nemo_pvs.planning.learned import end_of_reading, learned_target
from nemo_pvs.pruning.learned.mask_learning import MaskLearner, MaskSettings
from nemo_pvs.pruning.learned.sheared import save_masks
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.load import load_recipe, parse_recipe
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics, trainer
from nemo_pvs.training.checkpoints import checkpoint_name, newest_sound
from nemo_pvs.training.job import Loading, TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.launcher import ForkedLauncher
from tests.megatron.ranks import fork_context

STEPS = 160


def _values(folder: Path, **learn: Any) -> dict[str, Any]:
    parent = save_tiny_tokenizer(make_tiny_llama(folder / "parent", tie_word_embeddings=True))
    words = [f"w{number}" for number in torch.randint(2, 128, (61,), generator=torch.Generator().manual_seed(0))]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": " ".join(words[n % 61 :] + words * 5)}) for n in range(160)))
    return {
        "name": "tiny",
        "title": "A tiny run",
        "parent": {"source": str(parent), "pretraining_tokens": 1e6},
        "data": {"source": str(corpus), "split": {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1}},
        "targets": {
            "sheared": {
                "method": "sheared-llama",
                "hidden": 48,
                "ffn": 64,
                "learn": {
                    "tokens": STEPS * 4 * 32,
                    "mask_learning_rate": 0.5,
                    "validations": 2,
                    "checkpoints": 8,
                    "layout": {"pipeline_parallel": 2},
                    **learn,
                },
                "layout": {"tensor_parallel": 2},
            }
        },
        "calibrate": {"samples": 8, "sequence_length": 32},
        "arms": ["pruned"],
        "train": {
            "tokens": 512,
            "sequence_length": 32,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "validations": 2,
            "validation_samples": 8,
            "checkpoints": 1,
        },
        "evaluate": {"samples": 8, "sequence_length": 32},
    }


def _in_domains(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the recipe with noise as a second domain, of which mask learning asks for less and less."""
    noise = torch.randint(2, 128, (160, 330), generator=torch.Generator().manual_seed(1)).tolist()
    texts = (" ".join(f"w{number}" for number in document) for document in noise)
    (folder / "noise.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sources = {"song": values["data"]["source"], "noise": str(folder / "noise.jsonl")}
    learn = values["targets"]["sheared"]["learn"]
    how = {"target_losses": {"song": 4.0, "noise": 5.0}}
    values["data"]["source"] = sources
    learn["dynamic_loading"] = {"proportions": {"song": 0.5, "noise": 0.5}, "clip": True, **how}
    values["train"]["dynamic_loading"] = how
    return values


def _run(values: dict[str, Any], folder: Path) -> None:
    trainer._launch = ForkedLauncher
    Pipeline(parse_recipe(values, "test"), folder).run()


@pytest.mark.parallel
@pytest.mark.slow
def test_a_run_killed_while_it_learns_masks_goes_on_to_a_pruned_and_trained_model(
    tmp_path: Path, forked_launcher: None
) -> None:
    values, folder = _in_domains(_values(tmp_path), tmp_path), tmp_path / "run"
    masks = folder / "masks" / "sheared" / "run"
    child = fork_context().Process(target=_run, args=(values, folder))
    child.start()
    until = time.monotonic() + 500
    while newest_sound(masks / "nemo" / "checkpoints")[0] is None:
        assert child.is_alive()
        assert time.monotonic() < until
        time.sleep(0.1)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not (folder / "stages" / "masks-sheared.json").exists()
    _run(values, folder)

    steps = [
        record["step"] for record in map(json.loads, (masks / "metrics.jsonl").open()) if record["kind"] == "masks"
    ]
    assert steps.count(1) == 1, "it began again"
    curve = metrics.read(masks / "metrics.jsonl")
    assert [point["step"] for point in curve.masks] == list(range(1, STEPS + 1))
    pruned = folder / "pruned" / "sheared"
    plan = Plan.load(pruned / "plan.json")
    assert plan.method == "sheared-llama"
    assert (plan.target.hidden, plan.target.ffn, plan.target.layers) == (48, 64, 4)
    assert shape_of(open_source(pruned / "huggingface")) == plan.target
    assert curve.masks[-1]["sparsities"] == pytest.approx(curve.masks[-1]["targets"], abs=0.02)
    recipe = parse_recipe(values, "test")
    (arm,) = recipe.runs
    ledger = Ledger.load(folder / "models" / arm.name / LEDGER)
    (charge,) = (one for one in ledger.charges if one.activity == "mask learning")
    assert (charge.tokens, charge.steps) == (STEPS * 4 * 32, STEPS)
    assert ledger.total == arm_cost(recipe, arm, plan.target, plan.parent).total

    middle, last = curve.domains
    assert (middle["step"], last["step"], sum(last["samples"].values())) == (STEPS // 2, STEPS, STEPS * 4)
    assert middle["shares"] != last["shares"]
    job = TrainingJob.load(folder / "train" / arm.name / "job.json")
    assert job.loading == Loading(last["shares"], last["samples"]), "the arm does not go on where its masks ended"
    arms = metrics.read(job.metrics)
    assert sum(arms.domains[-1]["samples"].values()) == STEPS * 4 + arm.training.steps * 4
    assert arms.validation[-1]["loss"] == pytest.approx(sum(arms.domains[-1]["losses"].values()) / 2, abs=1e-5)
    windows = Pipeline(recipe, folder).tokens.validation_windows
    measured = perplexity(open_source(folder / "models" / arm.name), windows)
    assert arms.validation[-1]["loss"] == pytest.approx(measured["loss"], abs=2e-3)


def test_an_arm_reads_nothing_again_that_mask_learning_read_after_its_last_validation() -> None:
    """Training that was killed after its last save has recorded its domains at an earlier step last."""
    train = Training(
        tokens=30 * 8 * 4, sequence_length=4, global_batch_size=8, learning_rate=1e-3, validation_samples=8
    )
    shares = {"song": 0.7, "noise": 0.3}
    order = DomainOrder(dict.fromkeys(shares, 999), shares, dict.fromkeys(shares, 5), batch=8, seed=train.order_seed)
    last = {"step": 21, "shares": shares, "samples": order.state(21)["taken"]}
    read = order.state(30)["taken"]
    assert sum(read.values()) == 10 + 30 * 8
    assert at_the_end(last, train, None) == Loading(shares, read)
    assert at_the_end({**last, "step": 30, "samples": read}, train, {"song": 1.0}) == Loading({"song": 1.0}, read)
    assert at_the_end({**last, "step": 31, "samples": read}, train, None).samples == read


def test_what_is_prepared_first_is_the_job_that_learns_masks(tmp_path: Path) -> None:
    recipe, folder = parse_recipe(_values(tmp_path), "test"), tmp_path / "run"
    (path,) = Pipeline(recipe, folder).prepare_only()
    job = TrainingJob.load(path)
    assert path == (folder / "masks" / "sheared" / "run" / "job.json").resolve()
    assert job.masks is not None
    assert (job.masks.target.hidden, job.layout.pipeline_parallel, job.training.steps) == (48, 2, STEPS)
    assert shape_of(open_source(job.initial)).hidden == 64
    assert not (folder / "pruned").exists()
    before = job.initial.stat().st_mtime_ns
    assert Pipeline(recipe, folder).prepare_only() == [path]
    assert job.initial.stat().st_mtime_ns == before


@pytest.mark.slow
def test_masks_that_fall_short_stop_the_run_with_how_far_they_got_and_stay(tmp_path: Path) -> None:
    """Nothing is trained here: the masks are those of the first step, beside the last step's checkpoint."""
    recipe, folder = parse_recipe(_values(tmp_path), "test"), tmp_path / "run"
    (path,) = Pipeline(recipe, folder).prepare_only()
    job = TrainingJob.load(path)
    assert job.masks is not None
    initial = open_source(job.initial)
    write_nemo(initial, job.checkpoints / checkpoint_name(STEPS))
    save_masks(job.masks_file, MaskLearner(shape_of(initial), job.masks.target, MaskSettings()))
    with pytest.raises(UserError, match=r"would remove 0\.\d% of the hidden channels instead of 25\.0%, 0\."):
        Pipeline(recipe, folder).run()
    assert last_checkpoint(job).name == checkpoint_name(STEPS)
    assert job.masks_file.exists()
    assert not (folder / "pruned").exists()
    assert not (folder / "stages" / "masks-sheared.json").exists()


def test_mask_learning_is_training_of_the_whole_parent_and_charged_as_such(tmp_path: Path) -> None:
    plan = dry_run(load_recipe("llama31_8b/sheared"))
    (target,) = plan.targets
    assert "masks/4b-shear" in plan.stages
    (charge,) = target.spent.charges
    learned = learned_target(plan.recipe, target.target)
    assert learned is not None
    training = learned.training
    assert (charge.activity, charge.tokens, charge.steps) == ("mask learning", 419_430_400, 3200)
    assert charge.flops == 419_430_400 * plan.parent.flops_per_token(sequence_length=8192, training=True)
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (1e-4, 0.0, 320)
    assert learned.first_token == 701_000_000_000 // 131_072 * 131_072 + 131_072
    assert learned.layout.processes == 8
    data = {"train": "t", "validation": "v"}
    job = complete_job(learned, "4b-shear", target.target, target.expected.shape, tmp_path, data)
    assert TrainingJob.load(job.save()) == job


def test_mask_learning_counts_among_what_is_read() -> None:
    recipe = load_recipe("llama31_8b/sheared")
    learned = learned_target(recipe, recipe.targets["4b-shear"])
    assert learned is not None
    assert end_of_reading(recipe) == learned.first_token + 419_430_400
    assert "3,200 steps of 131,072 tokens" in learned.describe(dry_run(recipe).parent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": 64, "ffn": 96}, "Target sheared: it has the parent's sizes"),
        ({"hidden": 65}, "asks for hidden=65"),
        ({"heads": 4}, "its masks remove whole KV groups; leave heads out"),
        ({"method": "minitron-width"}, "learns no masks; leave learn out"),
        ({"learn": {"global_batch_size": 3}}, r"global_batch_size 3 is not a multiple"),
        ({"learn": {"global_batch_size": 6}}, r"validation_samples 8 is not a multiple"),
        ({"learn": {"layout": {"tensor_parallel": 3}}}, "Tensor parallelism 3 does not divide"),
        ({"learn": {"layout": {"pipeline_parallel": 3}}}, "Pipeline parallelism 3 does not divide"),
        ({"learn": {"mask_learning_rat": 1}}, "mask_learning_rat"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_any_work(change: dict, words: str, tmp_path: Path) -> None:
    values = _values(tmp_path)
    values["targets"]["sheared"] |= change
    with pytest.raises(UserError, match=words):
        dry_run(parse_recipe(values, "test"))
