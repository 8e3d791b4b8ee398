"""Masks learned on real NeMo and Megatron over gloo: as in float64, in every layout, after a kill -9, and exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.pruning.learned.gates import UNITS, Gates
from nemo_pvs.pruning.learned.mask_learning import MaskLearner, MaskSettings
from nemo_pvs.pruning.learned.sheared import sheared_plan
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.training.job import LearnedMasks, TrainingJob
from tests.conftest import save_tiny_tokenizer
from tests.megatron.jobs import SEQUENCE, VALIDATION_SAMPLES, accumulating, tiny_job
from tests.megatron.test_masks import Die, Run, _record_batches, _run
from tests.pruning.gated_llama import gated
from tests.state_source import as_transformers, tiny_model

pytestmark = pytest.mark.parallel

STEPS = 12
HOW = MaskLearning(mask_learning_rate=0.2, multiplier_learning_rate=0.5, target_warmup_fraction=0.25, seed=3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP=2": {"tensor_parallel": 2},
    "TP=2, sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP=2": {"pipeline_parallel": 2},
    "PP=2, virtual": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "DP=2": {"data_parallel": 2},
    "TP=2 PP=2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Twelve steps in fp32, long enough for every kind of unit to be closed somewhere."""
    folder = tmp_path_factory.mktemp("job")
    tiny_model(seed=5, std=0.1).save_pretrained(folder / "model")
    made = tiny_job(
        folder,
        HuggingFaceSource(save_tiny_tokenizer(folder / "model")),
        steps=STEPS,
        learning_rate=1e-3,
        weight_decay=0.0,
        warmup_fraction=0.25,
        validations=1,
        checkpoints=4,
    )
    target = shape_of(NemoSource(made.initial)).replace(hidden=48, ffn=60, kv_groups=1, layers=3)
    return accumulating(replace(made, masks=LearnedMasks(target, HOW)))


@pytest.fixture(scope="module")
def reference(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process and Megatron's plain fp32 optimizer."""
    return _run(job, tmp_path_factory.mktemp("reference"), change=_record_batches)


def _masks(run: Run) -> torch.Tensor:
    """Return what the metrics say of the masks, in a row a step: sparsities and multipliers of every kind of unit."""
    return torch.tensor(
        [
            [number for unit in UNITS for number in (step["sparsities"][unit], *step["multipliers"][unit])]
            for step in run.curve.masks
        ]
    )


def _gates(run: Run) -> Gates:
    """Return the exported gates; they are not at their target yet."""
    return Gates(**load_file(run.checkpoint.parents[2] / "masks.safetensors"))


def test_twelve_steps_are_those_of_float64(job: TrainingJob, reference: Run) -> None:
    assert job.masks is not None
    parent, settings = shape_of(NemoSource(job.initial)), job.training
    masks = MaskLearner(parent, job.masks.target, MaskSettings(0.2, 0.5, 3, seed=3))
    current: list[Gates] = []
    model = gated(as_transformers(NemoSource(job.initial)).double(), lambda: current[-1])
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, settings.adam_betas, settings.adam_eps, weight_decay=0.0)
    per_step = settings.global_batch_size // settings.micro_batch_size
    batches = reference.ranks[0]
    losses = []
    rates = [point["learning_rate"] for point in reference.curve.training]
    assert rates[0] == pytest.approx(settings.learning_rate / (settings.warmup_steps + 1))
    for step, rate in enumerate(rates):
        current.append(Gates(*(one.double() for one in masks.draw(step).tensors)).requires_grad_())
        optimizer.zero_grad()
        for tokens, labels in batches[step * per_step : (step + 1) * per_step]:
            loss = cross_entropy(model(torch.tensor(tokens)).logits.flatten(0, 1), torch.tensor(labels).flatten())
            (loss / per_step).backward()
            losses.append(float(loss) / per_step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        masks.learn(step, Gates(*(one.grad.float() for one in current[-1].tensors)), rate / settings.learning_rate)
        found = reference.curve.masks[step]["sparsities"]
        assert found == pytest.approx(masks.sparsities(), rel=2e-3), step
    by_step = torch.tensor(losses).view(STEPS, per_step).sum(1)
    assert torch.allclose(reference.losses, by_step, atol=1e-4)
    assert any((gates.hidden == 0).any() and (gates.ffn == 0).any() for gates in current), "nothing is ever closed"
    for drawn in zip(*(gates.tensors for gates in current), strict=True):
        assert any(((gates > 0) & (gates < 1)).any() for gates in drawn), "gates of one have no gradient"
    trained = open_source(reference.checkpoint)
    for name, weight in as_transformers(trained).double().named_parameters():
        expected = model.get_parameter(name)
        assert float((weight - expected).norm() / expected.norm()) < 1e-3, name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_learns_the_same(
    job: TrainingJob, reference: Run, layout: dict[str, Any], tmp_path: Path
) -> None:
    _assert_same(_run(job, tmp_path, layout), reference)


def _assert_same(run: Run, reference: Run) -> None:
    assert torch.allclose(run.losses, reference.losses, atol=2e-4)
    assert torch.allclose(_masks(run), _masks(reference), rtol=1e-2, atol=1e-3)
    for found, expected in zip(_gates(run).tensors, _gates(reference).tensors, strict=True):
        assert float(((found == 0) != (expected == 0)).float().mean()) < 0.02
        assert torch.allclose(found.sort().values, expected.sort().values, atol=1e-2)


def test_a_killed_run_goes_on_in_another_layout(job: TrainingJob, reference: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without a word"):
        _run(job, tmp_path, {"pipeline_parallel": 2}, Die(step=8))
    _assert_same(_run(job, tmp_path, {"tensor_parallel": 2}), reference)


def test_the_exported_model_has_the_validation_loss_of_the_last_step(job: TrainingJob, reference: Run) -> None:
    pruned, plan = sheared_plan(open_source(reference.checkpoint), _gates(reference), {})
    assert job.masks is not None
    assert plan.target == job.masks.target
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 128, (97,), generator=generator).repeat(200)[: VALIDATION_SAMPLES * SEQUENCE + 1]
    inputs, targets = text[:-1].view(-1, SEQUENCE), text[1:]
    with torch.no_grad():
        loss = cross_entropy(as_transformers(pruned)(inputs).logits.flatten(0, 1), targets)
    assert reference.curve.validation[-1]["loss"] == pytest.approx(float(loss), abs=2e-5)
