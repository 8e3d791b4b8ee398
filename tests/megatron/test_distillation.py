"""Distillation on real NeMo and Megatron over gloo: one curve on every layout, from a teacher that never changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.megatron.distillation.losses import initial_projection, vocabulary_parallel_kl
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.masked_source import MaskedSource
from tests.megatron.jobs import accumulating
from tests.megatron.ranks import run_ranks, write_tokens
from tests.megatron.test_training import _largest_difference, _losses
from tests.megatron.test_training import _train as train
from tests.state_source import as_transformers

pytestmark = pytest.mark.parallel

STEPS = 6
SEQUENCE = 32
SAMPLES = 8
PAIRS = ((1, 2), (2, 4), (3, 5))
"""At PP=2 of 4 layers and 6 the second pair's ends lie on two stages; in a virtual pipeline the third's do, too."""
TEACHER = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 6, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A run of six steps in fp32 with every loss; the teacher is wider and deeper, with its embeddings tied."""
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
            "validation": write_tokens(folder / "validation", text[: SAMPLES * SEQUENCE + 1]),
        },
        layout=Parallelism(),
        training=Training(
            tokens=_steps(STEPS),
            sequence_length=SEQUENCE,
            global_batch_size=8,
            micro_batch_size=2,
            learning_rate=3e-3,
            precision="fp32",
            validations=2,
            validation_samples=SAMPLES,
            checkpoints=2,
            distill=Distillation(
                teacher="elsewhere",
                temperature=2.0,
                top_k=50,
                lm_weight=0.25,
                layer_pairs=PAIRS,
                hidden_weight=0.5,
                embedding_weight=2.0,
                dynamic_weight=True,
            ),
        ),
        teacher=folder / "teacher",
    )


def _run(job: TrainingJob, folder: Path, **layout: Any) -> metrics.Metrics:
    job = accumulating(replace(job, folder=folder, layout=Parallelism(**layout)))
    folder.mkdir(exist_ok=True)
    run_ranks(job.layout.processes, train, job)
    return metrics.read(job.metrics)


def _with(job: TrainingJob, **training: Any) -> TrainingJob:
    return replace(job, training=job.training.model_copy(update=training))


def _steps(number: int) -> float:
    """Return the tokens of a run of this many steps."""
    return float(number * 8 * SEQUENCE)


def _divergences(curve: metrics.Metrics) -> list[float]:
    return [point["kl"] for point in curve.training]


def _farthest(one: metrics.Metrics, other: metrics.Metrics) -> float:
    """Return the largest difference of any loss of any step or validation."""
    names = ("loss", "kl", "hidden_loss", "embedding_loss")
    validation = _largest_difference(*([point["loss"] for point in curve.validation] for curve in (one, other)))
    return max(
        validation,
        *(
            _largest_difference(*([point[name] for point in curve.training] for curve in (one, other)))
            for name in names
        ),
    )


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory) -> metrics.Metrics:
    """The curve of one process."""
    curve = _run(job, tmp_path_factory.mktemp("reference"), distributed_optimizer=False)
    assert len(curve.training) == STEPS
    for loss in ("kl", "hidden_loss", "embedding_loss"):
        assert curve.training[-1][loss] < curve.training[0][loss] - 0.1, f"{loss}: it does not learn"
    return curve


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {"data_parallel": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    ],
    ids=lambda layout: " ".join(f"{name}={value}" for name, value in layout.items()),
)
def test_every_layout_has_the_same_curve(job, reference, layout, tmp_path):
    """TP=2 and PP=2 alone are those of the killed run below."""
    curve = _run(job, tmp_path / "run", **layout)
    assert _farthest(curve, reference) < 1e-4


def test_bf16_follows_fp32(job, reference, tmp_path):
    curve = _run(_with(job, precision="bf16"), tmp_path / "run", tensor_parallel=2)
    assert _largest_difference(_losses(curve), _losses(reference)) < 0.05
    assert _largest_difference(_divergences(curve), _divergences(reference)) < 0.1


def _train_and_record(job: TrainingJob) -> tuple[list[Any], bool]:
    """Train; return the batches of tokens and labels, and whether the teacher's weights are those of the start."""
    from nemo_pvs.megatron import pretrain
    from nemo_pvs.megatron.distillation.callback import Distill

    batches: list[Any] = []
    weights: list[list[torch.Tensor]] = []
    data_step, start = pretrain.causal_data_step, Distill.on_train_start

    def recording_data_step(*arguments):
        batch = data_step(*arguments)
        if torch.is_grad_enabled():  # the student's, not the teacher's
            batches.append((batch["tokens"].tolist(), batch["labels"].tolist()))
        return batch

    def note(callback):
        parameters = list(callback._model.model.parameters())
        assert not any(parameter.requires_grad for parameter in parameters)
        weights.append([parameter.clone() for parameter in parameters])

    def noting_start(callback, *arguments):
        start(callback, *arguments)
        note(callback)

    pretrain.causal_data_step = recording_data_step
    Distill.on_train_start = noting_start
    Distill.on_train_end = lambda callback, *_: note(callback)
    train(job)
    before, after = weights
    return batches, all(map(torch.equal, before, after))


def _steps_in_float64(job: TrainingJob, batches: list[Any], rates: list[float]) -> list[dict[str, float]]:
    """Return losses and gradient norms of the first steps, from the batches that Megatron read, by plain autograd."""
    how, settings = job.training.distill, job.training
    student, teacher = (as_transformers(open_source(path)).double() for path in (job.initial, job.teacher))
    parameters, projected = list(student.parameters()), torch.eye(64, dtype=torch.float64)
    adam = {"betas": settings.adam_betas, "eps": settings.adam_eps}
    optimizers = [torch.optim.AdamW(parameters, weight_decay=0.0, **adam)]
    if teacher.config.hidden_size != 64:
        projected = initial_projection(64, TEACHER["hidden_size"], settings.seed).double().requires_grad_()
        optimizers.append(torch.optim.Adam([projected], betas=settings.adam_betas))

    def unit(states: torch.Tensor) -> torch.Tensor:
        return states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def far(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = unit(ours) @ projected, unit(theirs)
        if how.hidden_loss == "mse":
            return (ours - theirs).square().mean()
        return 1 - cosine_similarity(ours, theirs, dim=-1).mean()

    alpha, found = 0.0 if how.dynamic_weight else 1.0, []
    per_step = settings.global_batch_size // settings.micro_batch_size
    for step, rate in enumerate(rates):
        lm, kl, hidden, embedding = torch.zeros(4, dtype=torch.float64)
        for tokens, labels in batches[step * per_step : (step + 1) * per_step]:
            ours = student(torch.tensor(tokens), output_hidden_states=True)
            with torch.no_grad():
                theirs = teacher(torch.tensor(tokens), output_hidden_states=True)
            distances = [far(ours.hidden_states[one], theirs.hidden_states[two]) for one, two in ((0, 0), *PAIRS)]
            hidden, embedding = hidden + sum(distances[1:]) / per_step, embedding + distances[0] / per_step
            logits, wanted = ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1) / 2.0
            wanted[wanted < wanted.topk(50).values[:, -1:]] = -torch.inf
            q, p = (logits / 2.0).log_softmax(-1), wanted.log_softmax(-1)
            kl = kl + 4.0 * kl_div(q, p, log_target=True, reduction="none").nansum(-1).mean() / per_step
            lm = lm + cross_entropy(logits, torch.tensor(labels).flatten()) / per_step
        states = 0.5 * hidden + 2.0 * embedding
        (0.25 * lm + kl + alpha * states).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
        measured = {"loss": lm, "kl": kl, "hidden_loss": hidden, "embedding_loss": embedding, "grad_norm": norm}
        found.append({name: float(value) for name, value in measured.items()})
        if how.dynamic_weight:
            alpha = float(kl / states)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("wider", [True, False], ids=["wider, cosine", "as wide, mse, dynamic"])
def test_steps_are_those_of_transformers_and_leave_the_teacher_alone(job, wider, tmp_path):
    """Every loss and the gradient norm of four steps in float64, of the first to single precision."""
    folder = tmp_path / "run"
    folder.mkdir()
    how = {"dynamic_weight": not wider, "hidden_loss": "cosine" if wider else "mse"}
    distill = job.training.distill.model_copy(update=how)
    ran = replace(_with(job, distill=distill, weight_decay=0.0, tokens=_steps(4)), folder=folder)
    if not wider:
        ran = replace(ran, teacher=make_tiny_llama(tmp_path / "equal", 5, initializer_range=0.1, num_hidden_layers=6))
    [(batches, unchanged)] = run_ranks(1, _train_and_record, ran)
    assert unchanged
    curve = metrics.read(ran.metrics).training
    assert len(curve) == 4
    expected = _steps_in_float64(ran, batches, [point["learning_rate"] for point in curve])
    for step, wanted in enumerate(expected):
        for name, value in wanted.items():
            assert curve[step][name] == pytest.approx(value, rel=1e-3 if step else 1e-4), (step, name)
    trained = TorchDistReader(last_checkpoint(ran) / "weights").names
    initial = TorchDistReader(job.initial / "weights").names
    assert {name for name in trained if name.startswith("module.")} == set(initial)
    assert not [name for name in trained if "teacher" in name or "projection" in name or "layers.4." in name]


@pytest.mark.parametrize("layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=["TP=2", "PP=2"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(job, layout, tmp_path):
    """The teacher is read from a NeMo checkpoint; exactly zero, because both compute the same."""
    alone = Distillation(teacher="elsewhere")
    same = _with(replace(job, teacher=job.initial), distill=alone, weight_decay=0.0, tokens=_steps(2))
    curve = _run(same, tmp_path / "run", **layout)
    assert _divergences(curve) == [0.0] * 2
    assert [point["grad_norm"] for point in curve.training] == [0.0] * 2
    assert curve.validation[0]["loss"] == curve.validation[-1]["loss"] > 1


def test_a_killed_run_goes_on_at_another_layout(job, reference, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    doomed = accumulating(replace(job, folder=folder, layout=Parallelism(tensor_parallel=2)))
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, train, doomed, 5)
    curve = _run(job, folder, pipeline_parallel=2)
    assert doomed.log.read_text().count(f"step 4/{STEPS}") == 2, (
        "it started over instead of at the checkpoint of step 3"
    )
    assert _farthest(curve, reference) < 1e-4


@pytest.mark.slow
def test_the_settings_of_gpus_change_nothing(job, reference, tmp_path):
    """Asynchronous and parallel saves, overlapped reduction in several buckets, workers that read the data."""
    run = accumulating(replace(job, folder=tmp_path / "run", layout=Parallelism(data_parallel=2)))
    run.folder.mkdir()
    run_ranks(2, train, run, 0, 0, True)
    assert _farthest(metrics.read(run.metrics), reference) < 1e-4


def test_a_sparse_student_learns_under_its_masks(job, tmp_path):
    write_nemo(MaskedSource(HuggingFaceSource(job.teacher.parent / "model")), tmp_path / "initial")
    sparse = replace(job, initial=tmp_path / "initial")
    curve = _run(sparse, tmp_path / "run", tensor_parallel=2)
    assert curve.training[-1]["kl"] < curve.training[0]["kl"] - 0.1
    matrices = list(matrix_sparsity(NemoSource(last_checkpoint(replace(sparse, folder=tmp_path / "run")))))
    assert matrices
    for matrix in matrices:
        assert matrix.masked
        assert matrix.zeros == matrix.masked
        assert matrix.disagreements == 0


def _kl_of_shards(arrays: list[np.ndarray], how: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the divergence of float64 logits, and the gradient of its weighted sum, from this rank's columns."""
    import torch.distributed as distributed

    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    student, teacher, weights = map(torch.from_numpy, arrays)
    mine = student.chunk(ranks, -1)[rank].clone().requires_grad_()
    kl = vocabulary_parallel_kl(mine, teacher.chunk(ranks, -1)[rank], group=distributed.group.WORLD, **how)
    (weights * kl).sum().backward()
    return kl.detach().numpy(), mine.grad.numpy()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 3.0}, {"temperature": 0.5, "top_k": 5}, {"top_k": 40}],
    ids=["", "T", "T, top-k", "top-k"],
)
def test_a_vocabulary_in_parts_has_the_divergence_of_the_whole(ranks, how):
    """Far-off logits, ties at the k-th of the teacher's, tokens without weight, more kept than a rank has columns."""
    generator = torch.Generator().manual_seed(ranks)
    student = 30 * torch.randn(7, 3, 64, generator=generator, dtype=torch.float64) + 1000
    teacher = (10 * torch.randn(7, 3, 64, generator=generator, dtype=torch.float64)).round() - 1000
    weights = torch.rand(7, 3, generator=generator, dtype=torch.float64) * (torch.arange(7) % 3 > 0).unsqueeze(1)
    found = run_ranks(ranks, _kl_of_shards, [one.numpy() for one in (student, teacher, weights)], how)
    whole = student.clone().requires_grad_()
    reference = _reference(whole, teacher, **how)
    (weights * reference).sum().backward()
    for kl, _ in found:
        np.testing.assert_allclose(kl, reference.detach(), rtol=1e-12, atol=1e-12)
    gradient = np.concatenate([part for _, part in found], -1)
    np.testing.assert_allclose(gradient, whole.grad, rtol=1e-11, atol=1e-14)
    assert not gradient[0].any()


def _kl_of_nemo(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the divergence by NeMo's distillation, and the gradient of its sum, from this rank's columns."""
    from types import SimpleNamespace

    import torch.distributed as distributed
    from nemo.collections.llm.modelopt.distill.loss import LogitsKLLoss

    from nemo_pvs.megatron.inference import megatron_ranks
    from nemo_pvs.system.ranks import joined

    with joined(on_gpus=True), megatron_ranks(2):
        student, teacher = (torch.from_numpy(one).chunk(2, -1)[distributed.get_rank()] for one in arrays)
        mine = student.clone().requires_grad_()
        kl, *_ = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=2))(mine, teacher)
        kl.sum().backward()
        whole = kl.detach().clone()
        distributed.all_reduce(whole)
        return whole.T.numpy(), mine.grad.numpy()


def test_nemos_own_distillation_has_the_same_divergence():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 3, 64, generator=generator) for _ in range(2))
    found = run_ranks(2, _kl_of_nemo, [student.numpy(), teacher.numpy()])
    whole = student.clone().requires_grad_()
    kl = vocabulary_parallel_kl(whole, teacher)
    kl.sum().backward()
    for theirs, _ in found:
        np.testing.assert_allclose(theirs, kl.detach(), rtol=1e-4)
    gradient = np.concatenate([part for _, part in found], -1)
    np.testing.assert_allclose(gradient, whole.grad, rtol=1e-3, atol=1e-6)


def _reference(student, teacher, temperature=1.0, top_k=None):
    """The definition, by PyTorch's own functions and autograd."""
    if top_k:
        teacher = teacher.masked_fill(teacher < teacher.sort(descending=True).values[..., top_k - 1, None], -torch.inf)
    p = (teacher / temperature).softmax(-1)
    terms = p * ((teacher / temperature).log_softmax(-1) - (student / temperature).log_softmax(-1))
    return temperature**2 * terms.masked_fill(p == 0, 0.0).sum(-1)


def test_the_teacher_computes_in_its_own_precision_within_a_layer_of_the_student_in_fp8(monkeypatch):
    """Without a pipeline it reads a micro-batch when the student's first compared layer ends, in the same context."""
    from nemo_pvs.megatron.distillation.teacher import Teacher

    enabled, seen = [False], []

    @contextmanager
    def fp8_autocast(*, enabled: bool, state: list[bool] = enabled) -> Iterator[None]:
        state.append(enabled)
        yield
        state.pop()

    engine = SimpleNamespace(fp8_autocast=fp8_autocast)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    teacher = object.__new__(Teacher)
    teacher.model = lambda *_: seen.append(enabled[-1])
    with engine.fp8_autocast(enabled=True):
        teacher._forward(iter([{"tokens": None, "position_ids": None}]), next)
        assert enabled[-1]
    assert seen == [False]
