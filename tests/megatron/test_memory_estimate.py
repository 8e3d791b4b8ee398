"""The memory estimate against Megatron's own construction of every cluster recipe's model in its real layout.

One process stands for a rank of each pipeline stage: a fake process group says that the other ranks are there, and
tensors are on the meta device, so that the largest model takes no memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.memory import _memory_of
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from nemo_pvs.recipe.training import Training
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel

TRAINING = Training(
    tokens=1e9,
    sequence_length=8192,
    global_batch_size=512,
    learning_rate=1e-4,
    validation_samples=512,
    precision="bf16",
)
"""Of which only the precision matters to weights, gradients and the optimizer."""


class Case(NamedTuple):
    """A model in a layout, as seen by a rank of one pipeline stage."""

    name: str
    config: dict[str, Any]
    shape: Shape
    layout: Parallelism
    stage: int


class Built(NamedTuple):
    """What Megatron allocated on the rank."""

    parameters: int
    gradient_bytes: int
    optimizer_bytes: int


def _cases() -> list[Case]:
    """Return what every cluster recipe trains, in its layouts, and the largest model of all in further layouts.

    Only the largest target of a recipe is built. A parent that the recipe trains first is a separate case.
    """
    cases = []
    for name in packaged_recipes():
        recipe = load_recipe(name)
        if recipe.train.precision != "bf16":
            continue
        plan, config = dry_run(recipe), dict(recipe.parent.normal_config or {})
        target = max(plan.targets, key=lambda planned: planned.expected.shape.parameters)
        models = [(target.name, target.expected.shape, target.target.layout)]
        models += [(f"masks of {one.name}", plan.parent, one.learned.layout) for one in plan.learnings]
        for model, shape, layout in models:
            for stage in sorted({0, layout.pipeline_parallel - 1}):
                cases.append(Case(f"{name} {model}", config, shape, layout, stage))
    largest = max(cases, key=lambda case: case.shape.parameters)
    for layout in (
        Parallelism(tensor_parallel=8, sequence_parallel=True),
        Parallelism(tensor_parallel=4, pipeline_parallel=4, sequence_parallel=True, data_parallel=8),
        Parallelism(pipeline_parallel=4, virtual_pipeline=2, data_parallel=2),
    ):
        for stage in sorted({0, layout.pipeline_parallel - 1}):
            cases.append(largest._replace(name=f"{largest.name} {layout}", layout=layout, stage=stage))
    return cases


def _build(cases: list[Case]) -> list[Built]:
    import torch

    from nemo_pvs.megatron.adamw import stand_in_for_fused_adam
    from nemo_pvs.megatron.cpu import megatron_on_cpu

    stand_in_for_fused_adam()
    with megatron_on_cpu():
        # This process ends with the test.
        torch.cuda.current_device = lambda: torch.device("meta")
        torch.distributed.all_gather_object = _everyone_says_the_same
        names = {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}
        torch.Tensor.type = lambda tensor: names[tensor.dtype]  # by which the optimizer tells weights apart
        return [_build_one(case) for case in cases]


def _everyone_says_the_same(objects: list[Any], said: Any, group: Any = None) -> None:
    """Stand in for ``all_gather_object``, which needs the ranks that are not there."""
    objects[:] = [said] * len(objects)


def _build_one(case: Case) -> Built:
    import fiddle
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from nemo.lightning import io
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_pvs.checkpoints.nemo.context import write_context
    from nemo_pvs.megatron.attention import FUSED_KERNELS, layer_spec
    from nemo_pvs.megatron.pretrain import data_parallelism

    layout = case.layout
    dist.init_process_group(
        "fake",
        rank=case.stage * layout.processes // layout.pipeline_parallel,
        world_size=layout.processes,
        store=FakeStore(),
    )
    parallel_state.initialize_model_parallel(
        layout.tensor_parallel,
        layout.pipeline_parallel,
        layout.virtual_pipeline,
        context_parallel_size=layout.context_parallel,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1)
    config = Layout.for_config(case.config).config(case.shape, {"torch_dtype": "bfloat16", **case.config})
    with tempfile.TemporaryDirectory() as folder:
        write_context(Path(folder) / "context", config, (), vocab_rows=case.shape.vocab)
        made = io.load_context(Path(folder) / "context", subpath="model", build=False).config
    for kernel in FUSED_KERNELS:
        setattr(made, kernel, False)
    settings = {
        "transformer_layer_spec": layer_spec,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "bf16": True,
        "use_cpu_initialization": False,
        "perform_initialization": False,
        "init_model_with_meta_device": True,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "sequence_parallel": layout.sequence_parallel,
    }
    for key, value in settings.items():
        setattr(made, key, value)
    built = fiddle.build(made)
    ddp, chunks = fiddle.build(data_parallelism(layout, gpu=True)), []
    for piece in range(layout.virtual_pipeline or 1):
        model = built.configure_model(
            None,
            pre_process=case.stage == 0 and piece == 0,
            post_process=case.stage == layout.pipeline_parallel - 1 and piece == (layout.virtual_pipeline or 1) - 1,
            **({"vp_stage": piece} if layout.virtual_pipeline else {}),
        )
        chunks.append(DistributedDataParallel(built, ddp, model, disable_bucketing=piece > 0))  # as NeMo does
    how = OptimizerConfig(
        optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    distributed = get_megatron_optimizer(how, chunks, use_gloo_process_groups=False)
    if hasattr(distributed, "chained_optimizers"):
        (distributed,) = distributed.chained_optimizers
    adam = distributed.optimizer
    distributed.init_state_fn(adam)  # as when it resumes: the moments of all weights
    weights = [weight for group in adam.param_groups for weight in group["params"]]
    held = weights + [value for state in adam.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in held} == {torch.float32}
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return Built(
        sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        sum(buffer.grad_data.nbytes for chunk in chunks for buffer in chunk.buffers),
        sum(tensor.nbytes for tensor in held),
    )


def test_the_estimate_is_what_megatron_allocates() -> None:
    cases = _cases()
    (built,) = run_ranks(1, _build, cases)
    assert len(cases) > 20
    for case, real in zip(cases, built, strict=True):
        estimate = _memory_of(case.shape, case.layout, TRAINING, case.stage, None)
        assert 2 * real.parameters == estimate.weights, case.name
        # Megatron pads each bucket of gradients so that the ranks' shards are aligned.
        assert estimate.gradients <= real.gradient_bytes <= 1.001 * estimate.gradients, case.name
        assert estimate.optimizer <= real.optimizer_bytes <= 1.001 * estimate.optimizer, case.name
