"""A teacher's answers, computed once on Megatron: the same at every layout, and training from them as online."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.data.sample_index import training_samples
from nemo_pvs.data.teacher_cache import TeacherCache
from nemo_pvs.recipe.distillation import Cache, Distillation
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.teaching_job import TeachingJob, content_for, load_job
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.masked_source import MaskedSource
from tests.megatron.jobs import accumulating
from tests.megatron.ranks import run_ranks, write_tokens
from tests.megatron.test_training import _largest_difference, _losses
from tests.megatron.test_training import _train as train
from tests.state_source import as_transformers

pytestmark = pytest.mark.parallel

STEPS, SEQUENCE, BATCH, K = 6, 32, 8, 50
TEACHER = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A run of six steps in fp32 that begins after two steps' samples; its teacher answers online."""
    folder = tmp_path_factory.mktemp("job")
    make_tiny_llama(folder / "teacher", seed=5, initializer_range=0.1, tie_word_embeddings=True, **TEACHER)
    save_tiny_tokenizer(make_tiny_llama(folder / "model"))
    write_nemo(HuggingFaceSource(folder / "model"), folder / "initial")
    text = torch.randint(3, 128, (97,), generator=torch.Generator().manual_seed(0)).repeat(200).tolist()
    return TrainingJob(
        name="test",
        folder=folder / "run",
        initial=folder / "initial",
        data={
            "train": write_tokens(folder / "train", text),
            "validation": write_tokens(folder / "validation", text[: BATCH * SEQUENCE + 1]),
        },
        layout=Parallelism(),
        training=Training(
            tokens=float(STEPS * BATCH * SEQUENCE),
            sequence_length=SEQUENCE,
            global_batch_size=BATCH,
            micro_batch_size=2,
            learning_rate=3e-3,
            precision="fp32",
            validations=2,
            validation_samples=BATCH,
            checkpoints=2,
            distill=Distillation(teacher="elsewhere", temperature=2.0, top_k=K, lm_weight=0.25),
        ),
        first_token=2 * BATCH * SEQUENCE,
        teacher=folder / "teacher",
    )


def _teaching(job: TrainingJob, folder: Path, precision: Any = "fp32", micro_batch: int = 3, **layout: int):
    """Return the job that writes a cache of samples around those of a training, with 64 of its 128 tokens."""
    end = job.first_token + int(job.training.tokens)
    identity = {"teacher": "t", "tokenizer": "k", "data": "d", "vocab": 128}
    content = content_for(job.training, job.first_token, end, **identity, top_k=64, precision=precision)
    return TeachingJob(
        name="teacher",
        folder=folder,
        teacher=job.teacher,
        text=job.data["train"],
        index=job.index,
        content=replace(content, first=content.first - 5, end=content.end + 3),
        layout=Parallelism(**layout),
        micro_batch_size=micro_batch,
        precision="fp32",
    )


def _teach(path: Path, die_after: int = 0) -> None:
    """Run a rank of the job in a file; with ``die_after`` all but the first rank of a replica die in the middle."""
    from nemo_pvs.megatron import rank

    job = load_job(path)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if die_after:
        write, written = TeacherCache.write, []

        def doomed_write(cache, shard, answers):
            if len(written) == die_after:
                (cache.folder / ".000099.safetensors.ab.partial").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(shard)
            write(cache, shard, answers)

        TeacherCache.write = doomed_write  # type: ignore[method-assign]
    rank.train_on_cpu(job)


def _written(job: TeachingJob, **options: Any) -> TeacherCache:
    run_ranks(job.layout.processes, _teach, job.save(), *options.values())
    return TeacherCache.open(job.folder)


@pytest.fixture(scope="module")
def cache(job, tmp_path_factory) -> TeacherCache:
    """The cache that one process has written."""
    return _written(_teaching(job, tmp_path_factory.mktemp("cache")))


def test_the_answers_are_those_of_transformers(job, cache):
    """Each sample's answers belong to its number in the order in which training reads."""
    content = cache.content
    samples = training_samples(
        job.data["train"], job.index, sequence_length=SEQUENCE, seed=content.seed, samples=content.end
    )
    teacher = as_transformers(open_source(job.teacher)).double()
    for number in (content.first, content.first + 17, content.end - 1):
        with torch.no_grad():
            wanted = teacher(samples[number]["tokens"][None]).logits[0].log_softmax(-1)
        answers = cache.read(number)
        ids, logprobs = (torch.from_numpy(np.array(part)) for part in (answers.ids.astype(np.int64), answers.logprobs))
        torch.testing.assert_close(logprobs.double(), wanted.topk(64).values, rtol=0, atol=2e-5)
        torch.testing.assert_close(wanted.gather(-1, ids), logprobs.double(), rtol=0, atol=2e-5)
        rest = torch.from_numpy(np.array(answers.rest)).double()
        total = logprobs.double().exp().sum(-1) + rest.exp()
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-6)


def _assert_equal(cache: TeacherCache, other: TeacherCache) -> None:
    for number in range(cache.content.first, cache.content.end):
        ours, theirs = cache.read(number), other.read(number)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=2e-5)
        np.testing.assert_allclose(ours.rest, theirs.rest, rtol=0, atol=2e-5)
        differ = ours.ids != theirs.ids  # only where tokens are as likely as each other
        swapped = np.abs(ours.logprobs - np.roll(ours.logprobs, 1, -1)) < 2e-5
        swapped |= np.abs(ours.logprobs - np.roll(ours.logprobs, -1, -1)) < 2e-5
        assert not (differ & ~swapped)[:, :-1].any()


@pytest.mark.parametrize(
    "layout",
    [{"tensor_parallel": 2, "data_parallel": 2}, {"pipeline_parallel": 2}],
    ids=["TP=2 DP=2", "PP=2"],
)
def test_every_layout_writes_the_same_answers(job, cache, layout, tmp_path):
    _assert_equal(_written(_teaching(job, tmp_path, micro_batch=2, **layout)), cache)


def test_a_killed_teacher_goes_on_in_another_layout(job, cache, tmp_path):
    doomed = _teaching(job, tmp_path, data_parallel=2)
    with pytest.raises(AssertionError, match="died without a word"):
        _written(doomed, die_after=3)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert 3 <= len(before) <= 6
    resumed = _teaching(job, tmp_path, tensor_parallel=2)
    assert not resumed.is_finished
    _assert_equal(_written(resumed), cache)
    assert resumed.is_finished
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before, "written again"
    assert not list(tmp_path.glob(".*.partial"))
    assert f"tokens {resumed.content.tokens:,}/{resumed.content.tokens:,}" in resumed.log.read_text()


def _run(job: TrainingJob, folder: Path, die_at_step: int = 0, **layout: Any) -> metrics.Metrics:
    job = accumulating(replace(job, folder=folder, layout=Parallelism(**layout)))
    folder.mkdir(exist_ok=True)
    run_ranks(job.layout.processes, train, job, die_at_step)
    return metrics.read(job.metrics)


def _from(job: TrainingJob, cache: TeacherCache, **distill: Any) -> TrainingJob:
    how = job.training.distill.model_copy(update={"cache": Cache(top_k=64), **distill})
    return replace(job, cache=cache.folder, training=job.training.model_copy(update={"distill": how}))


def _farthest(one: metrics.Metrics, other: metrics.Metrics, steps: int = STEPS) -> float:
    """Return the largest relative difference of loss, divergence and gradient norm in the first steps."""
    pairs = [
        (ours[name], theirs[name])
        for ours, theirs in list(zip(one.training, other.training, strict=True))[:steps]
        for name in ("loss", "kl", "grad_norm")
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


@pytest.fixture(scope="module")
def online(job, tmp_path_factory) -> metrics.Metrics:
    """The curve of one process whose teacher answers online."""
    curve = _run(job, tmp_path_factory.mktemp("online"), distributed_optimizer=False)
    assert curve.training[-1]["kl"] < curve.training[0]["kl"] - 0.1, "it does not learn"
    return curve


def test_training_from_the_cache_is_training_online(job, cache, online, tmp_path):
    """Losses and gradient norms of all steps on one rank; fewer tokens than the cache keeps; at temperature 2."""
    curve = _run(_from(job, cache), tmp_path / "run", distributed_optimizer=False)
    assert _farthest(curve, online, steps=1) < 1e-6
    assert _farthest(curve, online) < 1e-5
    assert [point["loss"] for point in curve.validation] == pytest.approx(
        [point["loss"] for point in online.validation], rel=1e-5
    )


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {"data_parallel": 2},
    ],
    ids=["TP=2", "PP=2", "DP=2"],
)
def test_every_layout_reads_its_samples_answers(job, cache, online, layout, tmp_path):
    """At DP=2 with micro-batches of another size."""
    curve = _run(_from(job, cache), tmp_path / "run", **layout)
    assert _farthest(curve, online, steps=1) < 2e-6
    assert _farthest(curve, online) < 1e-4


def test_a_killed_run_reads_on_where_it_was(job, cache, online, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="died without a word"):
        _run(_from(job, cache), folder, 5, tensor_parallel=2)
    curve = _run(_from(job, cache), folder, data_parallel=2)
    assert (folder / "log.txt").read_text().count(f"step 4/{STEPS}") == 2
    assert _farthest(curve, online) < 1e-4


def test_the_rest_as_a_class_is_the_same_online_and_from_the_cache(job, cache, online, tmp_path):
    how = {"temperature": 1.0, "rest": "class"}
    whole = replace(
        job, training=job.training.model_copy(update={"distill": _from(job, cache, **how).training.distill})
    )
    curves = [
        _run(run, tmp_path / name, tensor_parallel=2) for name, run in (("a", whole), ("b", _from(job, cache, **how)))
    ]
    assert _farthest(*curves, steps=1) < 1e-6
    assert _farthest(*curves) < 1e-3, "Adam amplifies rounding where gradients are small"
    assert _largest_difference(_losses(curves[0]), _losses(online)) > 1e-3, "it is another loss"


def test_half_precision_costs_little(job, online, tmp_path):
    cache = _written(_teaching(job, tmp_path / "cache", "fp16"))
    curve = _run(_from(job, cache), tmp_path / "run", distributed_optimizer=False)
    assert 1e-7 < _farthest(curve, online, steps=1) < 1e-3
    assert _farthest(curve, online) < 1e-2


def test_a_sparse_student_reads_the_same_answers(job, cache, tmp_path):
    write_nemo(MaskedSource(HuggingFaceSource(job.teacher.parent / "model")), tmp_path / "initial")
    sparse = replace(job, initial=tmp_path / "initial")
    runs = {"online": sparse, "cached": _from(sparse, cache)}
    curves = [_run(run, tmp_path / name, distributed_optimizer=False) for name, run in runs.items()]
    assert _farthest(*curves, steps=1) < 1e-6
    matrices = list(matrix_sparsity(NemoSource(last_checkpoint(replace(sparse, folder=tmp_path / "cached")))))
    assert matrices
    assert all(matrix.zeros == matrix.masked > 0 for matrix in matrices)


def test_ranks_refuse_a_cache_of_other_samples(job, cache, tmp_path):
    with pytest.raises(AssertionError, match=r"covers the tokens .* of the training order, but this training reads"):
        _run(replace(_from(job, cache), first_token=4 * BATCH * SEQUENCE), tmp_path / "run")
