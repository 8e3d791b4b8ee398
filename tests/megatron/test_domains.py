"""Dynamic batch loading on real NeMo and Megatron over gloo: in every layout the same, and after a kill -9."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.data.dynamic_loading import update_proportions
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.training.checkpoints import saved_checkpoints
from nemo_pvs.training.job import Loading, TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import SEQUENCE, VALIDATION_SAMPLES, tiny_job
from tests.megatron.ranks import write_tokens
from tests.megatron.test_masks import Die, Run, _record_batches, _run

pytestmark = pytest.mark.parallel

STEPS, EVERY = 12, 4
BATCH = 8
TARGETS = {"song": 3.5, "noise": 3.5}
HOW = DynamicLoading(proportions={"song": 0.75, "noise": 0.25}, target_losses=TARGETS, rate=1.0, smoothing=1e-2)
MIDDLE = 64
"""Tokens below are of the domain that can be learned, those above of the one that cannot."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    """Twelve steps over a text that repeats itself and one of random tokens, validated and saved every four."""
    folder = tmp_path_factory.mktemp("job")
    made = tiny_job(
        folder,
        HuggingFaceSource(save_tiny_tokenizer(make_tiny_llama(folder / "model"))),
        steps=STEPS,
        learning_rate=5e-3,
        micro_batch_size=4,
        validations=STEPS // EVERY,
        checkpoints=STEPS // EVERY,
        dynamic_loading=HOW,
    )
    generator = torch.Generator().manual_seed(1)
    song = torch.randint(3, MIDDLE, (31,), generator=generator).repeat(400)
    noise = torch.randint(MIDDLE, 128, (12000,), generator=generator)
    windows = VALIDATION_SAMPLES * SEQUENCE + 1
    data: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    for name, text in (("song", song), ("noise", noise)):
        data["train"][name] = write_tokens(folder / f"train-{name}", text[:-windows].tolist())
        data["validation"][name] = write_tokens(folder / f"validation-{name}", text[-windows:].tolist())
    loading = Loading(HOW.shares, {"song": 3, "noise": 5})
    return replace(made, data=data, loading=loading)


@pytest.fixture(scope="module")
def reference(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process."""
    return _run(job, tmp_path_factory.mktemp("reference"), change=_record_batches)


def _numbers(run: Run, key: str) -> torch.Tensor:
    return torch.tensor([list(point[key].values()) for point in run.curve.domains], dtype=torch.float64)


def test_shares_follow_the_losses_and_batches_the_shares(reference: Run) -> None:
    domains = reference.curve.domains
    assert [point["step"] for point in domains] == [4, 8, 12]
    shares = list(HOW.shares.values())
    for point, validation in zip(domains, reference.curve.validation, strict=True):
        losses = list(point["losses"].values())
        assert validation["loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
        shares = update_proportions(shares, losses, list(TARGETS.values()), smoothing=1e-2)
        assert list(point["shares"].values()) == pytest.approx(shares, abs=1e-12)
    assert domains[0]["losses"]["song"] - domains[-1]["losses"]["song"] > 0.5
    assert domains[-1]["shares"]["noise"] > 2 * HOW.shares["noise"], "nothing moves"
    # What was read, told from the tokens themselves: as many sequences as the metrics say, and none twice.
    batches = [sequence for tokens, _ in reference.ranks[0] for sequence in tokens]
    assert len(batches) == STEPS * BATCH
    for point in domains:
        read = batches[: point["step"] * BATCH]
        songs = sum(sequence[0] < MIDDLE for sequence in read)
        assert point["samples"] == {"song": 3 + songs, "noise": 5 + len(read) - songs}
    noise = {tuple(sequence) for sequence in batches if sequence[0] >= MIDDLE}
    assert len(noise) == domains[-1]["samples"]["noise"] - 5


def test_another_layout_reads_the_same(job: TrainingJob, reference: Run, tmp_path: Path) -> None:
    _assert_same(_run(job, tmp_path, {"tensor_parallel": 2}), reference)


def test_a_killed_run_goes_on_in_another_layout(job: TrainingJob, reference: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died without a word"):
        _run(job, tmp_path, {"pipeline_parallel": 2}, Die(step=10))
    _assert_same(_run(job, tmp_path, {"data_parallel": 2}), reference)


def test_a_domain_that_ends_stops_the_run_and_its_checkpoints_stay(job: TrainingJob, tmp_path: Path) -> None:
    assert job.loading is not None
    sequences = (12000 - VALIDATION_SAMPLES * SEQUENCE - 2) // SEQUENCE
    near = replace(job, loading=replace(job.loading, samples={"song": 0, "noise": sequences - 15}))
    with pytest.raises(AssertionError, match=rf"Domain noise ends before step [5-8]: it has {sequences} sequences"):
        _run(near, tmp_path)
    assert [path.name for path in saved_checkpoints(tmp_path / "nemo" / "checkpoints")] == ["step=3-last"]


def _assert_same(run: Run, reference: Run) -> None:
    assert torch.allclose(run.losses, reference.losses, atol=1e-4)
    assert _numbers(run, "samples").tolist() == _numbers(reference, "samples").tolist()
    for key in ("losses", "shares"):
        assert torch.allclose(_numbers(run, key), _numbers(reference, key), atol=1e-4)
