"""Sparse models on real NeMo and Megatron over gloo: pruned weights stay zero and the rest trains as it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.manifest import MANIFEST
from nemo_pvs.checkpoints.masks import masks_of, write_masks
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, stored_name, write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.sparsity import matrix_sparsity
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.masked_source import MaskedSource, RandomMasks
from tests.megatron.gpu_settings import set_up_as_on_gpus
from tests.megatron.jobs import accumulating, tiny_job
from tests.megatron.ranks import run_ranks
from tests.state_source import as_transformers
from tests.uneven_model import make_uneven

pytestmark = pytest.mark.parallel

STEPS = 6
DENSE = ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight")
"""Matrices without a mask that share a Megatron tensor with masked ones."""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A sparse run of six steps in fp32 with a constant learning rate, and gradients that are always clipped."""
    folder = tmp_path_factory.mktemp("job")
    dense = HuggingFaceSource(save_tiny_tokenizer(make_tiny_llama(folder / "model")))
    job = tiny_job(
        folder,
        MaskedSource(dense, RandomMasks(dense, dense=DENSE)),
        steps=STEPS,
        learning_rate=2e-3,
        min_learning_rate_ratio=1.0,
        warmup_fraction=0.0,
        weight_decay=0.5,
        clip_grad_norm=0.3,
        validations=1,
        checkpoints=1,
    )
    return accumulating(job)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    curve: metrics.Metrics
    checkpoint: Path
    ranks: list[Any]

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([point["loss"] for point in self.curve.training])

    @property
    def grad_norms(self) -> torch.Tensor:
        return torch.tensor([point["grad_norm"] for point in self.curve.training])


def _train(job: TrainingJob, change: Callable[[], Any]) -> Any:
    """Be a rank; ``change`` alters the process before it trains, and what it returns is returned."""
    import os

    from nemo_pvs.megatron import rank

    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    changed = change()
    rank.train_on_cpu(job)
    return changed


def _nothing() -> None:
    pass


def _record_batches() -> list[tuple[list, list]]:
    """Return a list that the training batches will be in: tokens and labels [micro batch, sequence]."""
    from nemo_pvs.megatron import pretrain

    batches: list[tuple[list, list]] = []
    original = pretrain.causal_data_step

    def recording(*arguments):
        batch = original(*arguments)
        if torch.is_grad_enabled():
            batches.append((batch["tokens"].tolist(), batch["labels"].tolist()))
        return batch

    pretrain.causal_data_step = recording
    return batches


def _leave_out_the_callback() -> None:
    from nemo_pvs.megatron import pretrain

    pretrain.hold_masks = lambda job: []


def _leave_out_the_hooks() -> None:
    from nemo_pvs.megatron.masks import optimizer

    optimizer._install = lambda *arguments, **options: None


@dataclass(frozen=True)
class Die:
    """Kill the last rank before a step."""

    step: int
    as_on_gpus: bool = False

    def __call__(self) -> None:
        import os
        import signal

        import lightning.pytorch as pl

        from nemo_pvs.megatron import rank

        step = self.step
        if self.as_on_gpus:
            set_up_as_on_gpus()

        class Killer(pl.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == step and trainer.global_rank == trainer.world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)

        original = rank.pretrain_recipe

        def doomed(job):
            recipe = original(job)
            recipe.trainer.callbacks.append(Killer())
            return recipe

        rank.pretrain_recipe = doomed


def _run(
    job: TrainingJob,
    folder: Path,
    layout: Mapping[str, Any] | None = None,
    change: Callable[[], Any] = _nothing,
    **training: Any,
) -> Run:
    given = Parallelism(**layout or {"distributed_optimizer": False})
    job = replace(job, folder=folder, layout=given, training=job.training.model_copy(update=training))
    job = accumulating(job)
    folder.mkdir(exist_ok=True)
    ranks = run_ranks(given.processes, _train, job, change)
    return Run(metrics.read(job.metrics), last_checkpoint(job), ranks)


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory) -> Run:
    """One process and Megatron's plain fp32 optimizer."""
    run = _run(job, tmp_path_factory.mktemp("reference"), change=_record_batches)
    assert {point["learning_rate"] for point in run.curve.training} == {job.training.learning_rate}
    assert run.losses[-1] < run.losses[0] - 0.3, "it does not learn"
    assert run.grad_norms.min() > job.training.clip_grad_norm, "nothing is clipped"
    return run


@dataclass(frozen=True)
class Oracle:
    losses: torch.Tensor
    grad_norms: torch.Tensor
    weights: dict[str, torch.Tensor]


def _oracle(job: TrainingJob, batches: list[Any], *, multiplied: bool, clip_before_mask: bool = False) -> Oracle:
    """Train in float64 with transformers and AdamW, as plainly as can be.

    Args:
        job: The run.
        batches: Its micro batches in order.
        multiplied: The dense model whose weights are multiplied by the masks; otherwise gradients are masked by hand.
        clip_before_mask: Of masking by hand: clip first.
    """
    source = NemoSource(job.initial)
    masks = {name: masks_of(source).read(name).double() for name in masks_of(source).names}
    model = as_transformers(source).double()
    weights = dict(model.named_parameters())
    settings = job.training
    groups = [
        {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, settings.adam_betas, settings.adam_eps)
    per_step = settings.global_batch_size // settings.micro_batch_size
    assert len(batches) == settings.steps * per_step
    losses, norms = [], []

    def mask_gradients():
        for name, mask in masks.items():
            weights[name].grad *= mask

    for first in range(0, len(batches), per_step):
        optimizer.zero_grad()
        loss = torch.tensor(0.0).double()
        for tokens, labels in batches[first : first + per_step]:
            targets = torch.tensor(labels).flatten()
            used = {
                name: weight * masks[name] if multiplied and name in masks else weight
                for name, weight in weights.items()
            }
            logits = torch.func.functional_call(model, used, (torch.tensor(tokens),)).logits
            loss = loss + cross_entropy(logits.flatten(0, 1), targets) / per_step
        loss.backward()
        if not multiplied and not clip_before_mask:
            mask_gradients()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), settings.clip_grad_norm).detach())
        if not multiplied and clip_before_mask:
            mask_gradients()
        optimizer.step()
        losses.append(loss.detach())
    trained = {name: weight.detach() * masks.get(name, 1) for name, weight in weights.items()}
    return Oracle(torch.stack(losses), torch.stack(norms), trained)


def _assert_equal(run: Run, oracle: Oracle) -> None:
    assert torch.allclose(run.losses.double(), oracle.losses, atol=2e-5)
    assert torch.allclose(run.grad_norms.double(), oracle.grad_norms, rtol=1e-4)
    trained = open_source(run.checkpoint)
    for name, expected in oracle.weights.items():
        weight = trained.read(name).double()
        # Adam divides by the gradient's size, so that a rounding error of a tiny gradient becomes a whole step.
        assert float((weight - expected).norm() / expected.norm()) < 1e-4, name


def _assert_held(checkpoint: Path, initial: Path, states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> None:
    """Weights, moments and fp32 masters of a checkpoint are zero where the initial masks say so, and only there."""
    trained, masks = NemoSource(checkpoint), masks_of(NemoSource(initial))
    found = list(matrix_sparsity(trained))
    assert sum(matrix.masked or 0 for matrix in found) > 10_000
    for matrix in found:
        assert matrix.disagreements == 0, matrix.name
        assert matrix.zeros == (matrix.masked or 0), matrix.name
    shape, reader = shape_of(trained), TorchDistReader(checkpoint / "weights")
    for entry in Layout.for_config(trained.config).entries(shape):
        for state in states:
            name = f"optimizer.state.{state}.{stored_name(entry, stacked=not shape.uneven)}"
            size = reader.size(name)
            first, count = (entry.layer, 1) if entry.layer is not None and not shape.uneven else (0, size[0])
            stored = reader.read(name, (first, *(0 for _ in size[1:])), (count, *size[1:]))
            tensors = entry.split(stored.view(entry.size(shape)), shape)
            for part, tensor in zip(entry.parts, tensors, strict=True):
                mask = masks.read(part.name) if part.name in masks.names else torch.ones_like(tensor).bool()
                assert not tensor[~mask].any(), f"{state} of {part.name}"
                if entry.layer is not None:
                    assert tensor[mask].count_nonzero() > 0.99 * int(mask.sum()), f"{state} of {part.name}"


@pytest.mark.parametrize("multiplied", [True, False])
def test_every_step_equals_the_dense_model_with_multiplied_weights(job, reference, multiplied):
    _assert_equal(reference, _oracle(job, reference.ranks[0], multiplied=multiplied))
    _assert_held(reference.checkpoint, job.initial)


def test_zeros_are_logged_and_masks_travel_to_hugging_face_and_back(job, reference, tmp_path):
    convert(reference.checkpoint, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "nemo", to="nemo")
    initial = NemoSource(job.initial).masks
    for folder in (reference.checkpoint, tmp_path / "hf", tmp_path / "nemo"):
        masks = masks_of(open_source(folder))
        assert set(masks.names) == set(initial.names)
        assert all(torch.equal(masks.read(name), initial.read(name)) for name in masks.names)
        assert not any(matrix.disagreements for matrix in matrix_sparsity(open_source(folder)))
    # Parts without a mask, too: each shares its Megatron tensor with masked ones.
    weights = sum(matrix.weights for matrix in matrix_sparsity(NemoSource(job.initial)))
    pruned = sum(int((~initial.read(name)).sum()) for name in initial.names)
    assert [point["step"] for point in reference.curve.sparsity] == [0, STEPS]
    assert [point["zero_fraction"] for point in reference.curve.sparsity] == pytest.approx([pruned / weights] * 2)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"pipeline_parallel": 2, "distributed_optimizer": False},
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {"data_parallel": 2, "distributed_optimizer": False},
        {"tensor_parallel": 2, "data_parallel": 2},
    ],
    ids=lambda layout: " ".join(f"{name}={value}" for name, value in layout.items()),
)
def test_every_layout_has_the_same_curve_and_holds(job, reference, layout, tmp_path):
    run = _run(job, tmp_path / "run", layout)
    assert torch.allclose(run.losses, reference.losses, atol=1e-4)
    assert torch.allclose(run.grad_norms, reference.grad_norms, rtol=1e-3)
    assert [point["zero_fraction"] for point in run.curve.sparsity] == pytest.approx(
        [point["zero_fraction"] for point in reference.curve.sparsity]
    )
    _assert_held(run.checkpoint, job.initial)


@pytest.mark.parametrize(
    ("layout", "master"),
    [({"tensor_parallel": 2, "distributed_optimizer": False}, "fp32_param"), ({"data_parallel": 2}, "param")],
    ids=["TP=2, plain optimizer", "DP=2, distributed optimizer"],
)
def test_bf16_holds_in_the_fp32_masters(job, reference, layout, master, tmp_path):
    run = _run(job, tmp_path / "run", layout, precision="bf16")
    assert torch.allclose(run.losses, reference.losses, atol=0.05)
    assert NemoSource(run.checkpoint).dtype(DENSE[0]) == torch.bfloat16
    _assert_held(run.checkpoint, job.initial, ("exp_avg", "exp_avg_sq", master))


def test_masks_follow_from_tp_to_pp_to_dp(job, reference, tmp_path):
    """Killed twice, each time the run goes on in another layout from its last checkpoint."""
    folder = tmp_path / "run"
    for layout, step in (({"tensor_parallel": 2}, 3), ({"pipeline_parallel": 2}, 5)):
        with pytest.raises(AssertionError, match="died without a word"):
            _run(job, folder, layout, Die(step), checkpoints=3)
    run = _run(job, folder, {"data_parallel": 2})
    assert [point["step"] for point in run.curve.sparsity] == [0, 2, 4, STEPS], "it did not resume where it should"
    assert torch.allclose(run.losses, reference.losses, atol=1e-4)
    assert torch.allclose(run.grad_norms, reference.grad_norms, rtol=1e-3)
    _assert_held(run.checkpoint, job.initial)


@pytest.mark.slow
def test_the_settings_of_gpus_hold_masks(job, reference, tmp_path):
    """Killed and resumed: asynchronous saves, and overlapped reduction in several buckets."""
    with pytest.raises(AssertionError, match="died without a word"):
        _run(job, tmp_path / "run", {"data_parallel": 2}, Die(3, as_on_gpus=True), checkpoints=3)
    run = _run(job, tmp_path / "run", {"data_parallel": 2}, set_up_as_on_gpus)
    assert torch.allclose(run.losses, reference.losses, atol=1e-4)
    assert torch.allclose(run.grad_norms, reference.grad_norms, rtol=1e-3)
    _assert_held(run.checkpoint, job.initial)


def test_clipping_before_masking_is_the_published_order(job, reference, tmp_path):
    run = _run(job, tmp_path / "run", {"data_parallel": 2}, clip_before_mask=True, mask_check_steps=4)
    assert [point["step"] for point in run.curve.sparsity] == [*range(0, STEPS, 4), STEPS]
    _assert_equal(run, _oracle(job, reference.ranks[0], multiplied=False, clip_before_mask=True))
    _assert_held(run.checkpoint, job.initial)
    assert (run.grad_norms > 1.05 * reference.grad_norms).all(), "dead weights have no part in the norm"
    assert not torch.allclose(run.losses, reference.losses, atol=1e-4)


def test_without_the_callback_pruned_weights_grow_back(job, tmp_path):
    run = _run(job, tmp_path / "run", change=_leave_out_the_callback)
    for matrix in matrix_sparsity(NemoSource(run.checkpoint)):
        assert matrix.masked is None or matrix.disagreements > 0.9 * matrix.masked


def test_a_broken_mask_stops_every_rank_with_the_matrix_name(job, tmp_path):
    with pytest.raises(
        AssertionError, match=rf"At step {STEPS} pruned weights are not zero in decoder\.layers\.0\.mlp"
    ):
        _run(job, tmp_path / "run", {"pipeline_parallel": 2}, _leave_out_the_hooks)


def test_masks_of_another_model_of_the_same_shape_are_refused_at_the_first_step(job, tmp_path):
    foreign = tmp_path / "initial"
    shutil.copytree(job.initial, foreign)
    (foreign / "context" / "masks.safetensors").unlink()
    write_masks(RandomMasks(NemoSource(job.initial), seed=1), foreign / "context" / "masks.safetensors")
    (foreign / MANIFEST).unlink()
    with pytest.raises(AssertionError, match=r"At step 0 pruned weights are not zero in .* and 13 more"):
        _run(replace(job, initial=foreign), tmp_path / "run")
    assert not metrics.read(tmp_path / "run" / "metrics.jsonl").training


def test_uneven_layers_hold(job, tmp_path):
    dense = HuggingFaceSource(save_tiny_tokenizer(make_uneven(tmp_path / "model")))
    write_nemo(MaskedSource(dense), tmp_path / "initial")
    run = _run(
        replace(job, initial=tmp_path / "initial"), tmp_path / "run", {"tensor_parallel": 2, "pipeline_parallel": 2}
    )
    assert run.losses[-1] < run.losses[0]
    _assert_held(run.checkpoint, tmp_path / "initial")


def test_three_ranks_share_three_kv_groups(tmp_path):
    """SmolLM2's form: 9 heads in 3 groups, at TP=3."""
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 129}
    dense = HuggingFaceSource(save_tiny_tokenizer(make_tiny_llama(tmp_path / "model", **sizes), 129))
    job = tiny_job(tmp_path, MaskedSource(dense), steps=3, clip_grad_norm=0.3, validations=1, checkpoints=1)
    one, three = (_run(job, tmp_path / str(ranks), {"tensor_parallel": ranks}) for ranks in (1, 3))
    assert (one.losses - three.losses).abs().max() < 1e-4
    _assert_held(three.checkpoint, job.initial)


def test_what_cannot_hold_masks_is_refused(job, tmp_path):
    run_ranks(1, _check_refusals, job)


def _check_refusals(job: TrainingJob) -> None:
    from types import SimpleNamespace

    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer, MegatronOptimizer

    from nemo_pvs.megatron.cpu import megatron_on_cpu
    from nemo_pvs.megatron.masks import optimizer as masks_optimizer
    from nemo_pvs.megatron.masks.optimizer import MaskedOptimizer
    from nemo_pvs.megatron.masks.rank_masks import RankMasks

    model, masks = torch.nn.Linear(2, 2), RankMasks(NemoSource(job.initial))
    with megatron_on_cpu():

        def refused(reason: str, *, fsdp: bool = False, **settings: Any) -> None:
            config = OptimizerConfig(optimizer="adam")
            for name, value in settings.items():  # not to its constructor, which asks for Transformer Engine
                setattr(config, name, value)
            optimizer = FP32Optimizer(torch.optim.AdamW(model.parameters()), config, lambda *_: None)
            optimizer.ddp_config = SimpleNamespace(use_megatron_fsdp=fsdp)
            with pytest.raises(UserError, match=reason):
                MaskedOptimizer([ChainedOptimizer([optimizer])], model, masks)

        refused("precision-aware", use_precision_aware_optimizer=True)
        refused("CPU offload", optimizer_cpu_offload=True)
        refused("Megatron-FSDP", fsdp=True)
        adamw = torch.optim.AdamW(model.parameters())
        optimizer = FP32Optimizer(adamw, OptimizerConfig(optimizer="adam"), lambda *_: None)
        masked = {model.weight: next(iter(masks.entries.values()))}
        # What Transformer Engine says of its own parameters; it cannot be installed without CUDA.
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(masks_optimizer, "is_float8tensor", lambda parameter: parameter is model.weight)
        with pytest.raises(UserError, match="FP8 parameters are quantised inside Transformer Engine"):
            masks_optimizer.refuse_unfit(optimizer, masked)
        monkeypatch.undo()
        optimizer.__class__ = type("LayerwiseOptimizer", (MegatronOptimizer,), {"__abstractmethods__": frozenset()})
        with pytest.raises(UserError, match="LayerwiseOptimizer is not supported"):
            masks_optimizer.refuse_unfit(optimizer, {})
