"""Pruning while training on real NeMo and Megatron over gloo: what goes stays gone, and every layout agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from nemo_pvs.checkpoints.files.torch_dist import TorchDistReader
from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource, stored_name, write_nemo
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.compensation import predictors
from nemo_pvs.pruning.learned.kept_units import KeptUnits, state_file
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import last_checkpoint
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import SEQUENCE, VALIDATION_SAMPLES, tiny_job
from tests.megatron.ranks import run_ranks
from tests.megatron.test_masks import Die, _nothing, _record_batches, _train
from tests.state_source import StateSource, as_transformers

pytestmark = pytest.mark.parallel

STEPS = 12
TEXT = torch.randint(3, 128, (97,), generator=torch.Generator().manual_seed(0)).repeat(200).tolist()


def make_job(folder: Path, how: Mapping[str, Any], **overrides: Any) -> TrainingJob:
    dense = save_tiny_tokenizer(make_tiny_llama(folder / "model", **overrides))
    job = tiny_job(
        folder,
        HuggingFaceSource(dense),
        steps=STEPS,
        text=TEXT,
        learning_rate=2e-3,
        min_learning_rate_ratio=1.0,
        warmup_fraction=0.0,
        weight_decay=0.5,
        validations=1,
        checkpoints=4,
    )
    # All kinds have to go: of groups and channels so few may that hidden channels must.
    usual = {"tokens": job.training.tokens, "start_tokens": 3 * 8 * SEQUENCE, "pace": "linear", "uniform": False}
    # Every third position is sampled, which no shard of a sequence begins with by itself.
    limits = {"compensation_tokens": 80, "least_ffn": 48, "ffn_at_once": 8, "hidden_at_once": 4, "least_hidden": 32}
    parameters = int(0.52 * shape_of(HuggingFaceSource(dense)).parameters)
    return replace(job, pruning=PruningAware(**{**usual, **limits, "parameters": parameters, **how}))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    return make_job(tmp_path_factory.mktemp("job"), {})


@dataclass(frozen=True)
class Run:
    """A finished run."""

    job: TrainingJob
    curve: metrics.Metrics
    checkpoint: Path
    state: KeptUnits
    space: UnitSpace
    batches: Any
    """What the change of the process before the run returned, of rank 0."""

    @property
    def losses(self) -> torch.Tensor:
        return torch.tensor([point["loss"] for point in self.curve.training])


def _run(job: TrainingJob, folder: Path, layout: Mapping[str, Any] | None = None, change: Any = _nothing) -> Run:
    given = Parallelism(**layout or {"distributed_optimizer": False})
    job = replace(job, folder=folder, layout=given)
    folder.mkdir(exist_ok=True)
    job.save()
    ranks = run_ranks(given.processes, _train, job, change)
    space = UnitSpace(shape_of(NemoSource(job.initial)))
    state = KeptUnits.load(state_file(folder, job.training.steps), space)
    return Run(job, metrics.read(job.metrics), last_checkpoint(job), state, space, ranks[0])


@pytest.fixture(scope="module")
def reference(job, tmp_path_factory) -> Run:
    """One process and Megatron's plain fp32 optimizer."""
    return _run(job, tmp_path_factory.mktemp("reference"))


def _assert_removed(run: Run) -> None:
    """Weights and moments of removed units are zero in the checkpoint, and no others."""
    layout, space = Layout.for_config(NemoSource(run.checkpoint).config), run.space
    reader = TorchDistReader(run.checkpoint / "weights")
    prefixes = ("module.", "optimizer.state.exp_avg.module.", "optimizer.state.exp_avg_sq.module.")
    for entry in layout.entries(space.shape):
        rows, columns = (run.state.kept[units] for units in space.of_tensor(entry))
        kept = (rows[:, None] & columns).view(entry.size(space.shape))
        for prefix in prefixes:
            name = stored_name(entry, stacked=True).removeprefix("module.")
            size = reader.size(prefix + name)
            first, count = (entry.layer, 1) if entry.layer is not None else (0, size[0])
            stored = reader.read(prefix + name, (first, *(0 for _ in size[1:])), (count, *size[1:]))
            tensor = stored.view(entry.size(space.shape))
            assert not tensor[~kept].any(), prefix + name
            if entry.layer is not None:
                assert tensor[kept].count_nonzero() > 0.99 * int(kept.sum()), prefix + name


def _compacted_loss(run: Run) -> float:
    """Return the validation loss of the pruned model on transformers."""
    plan = run.space.plan(run.state.kept, "efficient-llm", {})
    assert plan.target.parameters <= run.job.pruning.parameters
    model = as_transformers(PrunedSource(NemoSource(run.checkpoint), plan))
    ids = torch.tensor(TEXT[: VALIDATION_SAMPLES * SEQUENCE + 1])
    inputs, labels = (part.view(VALIDATION_SAMPLES, SEQUENCE) for part in (ids[:-1], ids[1:]))
    with torch.no_grad():
        return float(cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten()))


def test_units_of_all_kinds_go_and_the_model_learns(job, reference):
    kinds = {removal["kind"] for removal in reference.state.removals}
    assert kinds == {"hidden", "groups", "ffn"}
    assert min(removal["step"] for removal in reference.state.removals) == 3
    assert reference.state.removals[-1]["parameters"] <= job.pruning.parameters
    assert reference.losses[-1] < reference.losses[0] - 0.1
    assert [point["parameters"] for point in reference.curve.pruning] == sorted(
        {removal["step"]: removal["parameters"] for removal in reference.state.removals}.values(), reverse=True
    )


def test_what_goes_has_no_weights_and_no_moments(reference):
    _assert_removed(reference)


def test_masked_is_compacted(reference):
    assert _compacted_loss(reference) == pytest.approx(reference.curve.validation[-1]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"tensor_parallel": 2, "distributed_optimizer": False},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 2, "virtual_pipeline": 2, "distributed_optimizer": False},
        {"data_parallel": 2, "distributed_optimizer": False},
        {"data_parallel": 2},
    ],
    ids=lambda layout: " ".join(f"{name}={value}" for name, value in layout.items()),
)
def test_every_layout_removes_the_same(job, reference, layout, tmp_path):
    run = _run(job, tmp_path / "run", layout)
    assert torch.allclose(run.losses, reference.losses, atol=1e-4)
    assert torch.equal(run.state.kept, reference.state.kept)
    assert torch.allclose(run.state.totals, reference.state.totals, rtol=2e-2, atol=1e-6)
    _assert_removed(run)


def test_killed_twice_it_goes_on_from_tp_to_pp_to_dp(job, reference, tmp_path):
    folder = tmp_path / "run"
    for layout, step in (({"tensor_parallel": 2}, 5), ({"pipeline_parallel": 2}, 8)):
        with pytest.raises(AssertionError, match="died without a word"):
            _run(job, folder, layout, Die(step))
    run = _run(job, folder, {"data_parallel": 2})
    assert torch.allclose(run.losses, reference.losses, atol=1e-4)
    assert torch.equal(run.state.kept, reference.state.kept)
    _assert_removed(run)


@pytest.mark.parametrize("layout", [None, {"pipeline_parallel": 2}], ids=["one rank", "PP=2"])
def test_a_tied_model_in_bf16_prunes_uniformly(layout, tmp_path):
    job = make_job(tmp_path, {"uniform": True}, tie_word_embeddings=True)
    job = replace(job, training=job.training.model_copy(update={"precision": "bf16"}))
    run = _run(job, tmp_path / "run", layout)
    assert not run.space.kept_shape(run.state.kept).uneven
    _assert_removed(run)
    assert _compacted_loss(run) == pytest.approx(run.curve.validation[-1]["loss"], abs=0.02)


@pytest.mark.parametrize("kind", ["hidden", "groups", "ffn"])
def test_what_goes_is_made_up_for(kind, tmp_path):
    """One removal of a model that learns nothing, against Hessians and least squares in float64 on transformers."""
    sizes = {"hidden": 64, "groups": 2, "ffn": 96}
    least = {f"least_{one}": size for one, size in sizes.items() if one != kind}
    how = {"tokens": 8 * SEQUENCE, "start_tokens": 0, "pace": "one", "uniform": True, "compensation_tokens": 512}
    job = make_job(tmp_path, {f"least_{kind}": 1, **least, **how})
    whole = shape_of(NemoSource(job.initial)).parameters
    pruning = job.pruning.model_copy(update={"parameters": whole - 1})
    training = job.training.model_copy(update={"tokens": 8 * SEQUENCE, "learning_rate": 1e-30})
    run = _run(replace(job, pruning=pruning, training=training), tmp_path / "run", change=_record_batches)
    assert [removal["kind"] for removal in run.state.removals] == [kind]
    expected = _made_up_for(NemoSource(job.initial), run, kind)
    for name, tensor in expected.items():
        assert torch.allclose(NemoSource(run.checkpoint).read(name).double(), tensor, atol=2e-5), name


def _made_up_for(source: NemoSource, run: Run, kind: str) -> dict[str, torch.Tensor]:
    """Return every tensor of the model without the units that a run has removed, in float64."""
    model = as_transformers(source).double()
    hessians: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            states = inputs[0].flatten(0, -2)
            hessians[name] = hessians.get(name, 0) + states.T @ states

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(f"{name}.weight"))
    with torch.no_grad():
        for tokens, _ in run.batches:
            model(torch.tensor(tokens))
    expected = {}
    axes = {"hidden": "hidden", "groups": "query", "ffn": "ffn"}
    for name, (part, _) in Layout.for_config(source.config).parts(run.space.shape).items():
        tensor = source.read(name).double()
        rows = run.state.kept[run.space.along(part.axes[0], part.layer)]
        tensor[~rows] = 0
        if len(part.axes) > 1:
            columns = run.state.kept[run.space.along(part.axes[1], part.layer)]
            if part.axes[1] == axes[kind] and name in hessians:
                gone = (~columns).nonzero().flatten()
                tensor += tensor[:, gone] @ predictors(hessians[name], gone, columns, run.job.pruning.damping).T
            tensor[:, ~columns] = 0
        expected[name] = tensor
    return expected


def test_planted_useless_units_of_all_kinds_are_the_ones_that_go(tmp_path):
    """A quarter of the hidden channels, one of two groups and half of the FFN channels of every layer do nothing."""
    job = make_job(tmp_path, {"uniform": True, "least_ffn": 1, "least_hidden": 1}, initializer_range=0.1)
    source = NemoSource(job.initial)
    space, model = UnitSpace(shape_of(source)), as_transformers(source)
    useful, generator = space.everything(), torch.Generator().manual_seed(0)
    useless = torch.randperm(64, generator=generator)[:16]
    space.hidden(useful)[useless] = False
    with torch.no_grad():
        model.model.embed_tokens.weight[:, useless] = 0
        for index, layer in enumerate(model.model.layers):
            group, channels = index % 2, torch.randperm(96, generator=generator)[:48]
            space.groups(useful)[index, group] = False
            space.ffn(useful)[index, channels] = False
            layer.self_attn.o_proj.weight[:, 64 * group : 64 * group + 64] = 0
            layer.mlp.down_proj.weight[:, channels] = 0
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[useless] = 0
    planted = StateSource(model)
    planted.assets = HuggingFaceSource(tmp_path / "model").assets
    write_nemo(planted, tmp_path / "planted")
    target = space.kept_shape(useful)
    assert (target.hidden, target.kv_groups, target.ffn) == (48, 1, 48)
    pruning = job.pruning.model_copy(update={"parameters": target.parameters})
    training = job.training.model_copy(update={"learning_rate": 1e-30})
    run = _run(replace(job, initial=tmp_path / "planted", pruning=pruning, training=training), tmp_path / "run")
    assert {removal["kind"] for removal in run.state.removals} == {"hidden", "groups", "ffn"}
    assert torch.equal(run.state.kept, useful)


def test_a_target_that_is_not_reached_stops_before_the_last_checkpoint(job, tmp_path):
    """Nine removals can do it if hidden channels go, but FFN channels go first."""
    how = job.pruning.model_copy(
        update={"pace": "one", "hidden_at_once": 8, "ffn_at_once": 1, "parameters": job.pruning.parameters * 1.5}
    )
    with pytest.raises(AssertionError, match=r"After all 12 steps and 9 removals .* more removals, or"):
        _run(replace(job, pruning=how), tmp_path / "run")
    assert state_file(tmp_path / "run", 9).exists()
    assert not state_file(tmp_path / "run", STEPS).exists()


def test_samples_of_inputs_keep_no_whole_input_in_memory() -> None:
    run_ranks(1, _check_samples)


def _check_samples() -> None:
    from nemo_pvs.megatron.pruning.input_samples import InputSamples

    for sequences in (1, 2):
        module, site = torch.nn.Linear(8, 8), (0, "mlp.linear_fc1")
        samples = InputSamples({site: module}, stride=16, sequence_parallel=False)
        samples.active = True
        states = torch.randn(64, sequences, 8)
        module(states)
        [kept] = samples._kept[site]
        assert torch.equal(kept, states[::16].flatten(0, 1))
        assert kept.untyped_storage().nbytes() == kept.nbytes
