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
from nemo_pvs.planning.memory import parameters_on
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.load import load_recipe, packaged_recipes
from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


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
    """Return the largest model of every cluster recipe in its layout, and the largest of all in further layouts."""
    cases = []
    for name in packaged_recipes():
        recipe = load_recipe(name)
        if recipe.train.precision != "bf16":
            continue
        target = max(dry_run(recipe).targets, key=lambda planned: planned.expected.shape.parameters)
        layout, config = target.target.layout, dict(recipe.parent.normal_config or {})
        for stage in sorted({0, layout.pipeline_parallel - 1}):
            cases.append(Case(f"{name} {target.name}", config, target.expected.shape, layout, stage))
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

    from nemo_pvs.megatron.cpu import megatron_on_cpu

    with megatron_on_cpu():
        torch.cuda.current_device = lambda: torch.device("meta")  # this process ends with the test
        return [_build_one(case) for case in cases]


def _build_one(case: Case) -> Built:
    import fiddle
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from nemo.lightning import io
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_pvs.checkpoints.nemo.context import write_context
    from nemo_pvs.megatron.attention import FUSED_KERNELS, layer_spec

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
    parameters = gradient_bytes = shard = 0
    for piece in range(layout.virtual_pipeline or 1):
        model = built.configure_model(
            None,
            pre_process=case.stage == 0 and piece == 0,
            post_process=case.stage == layout.pipeline_parallel - 1 and piece == (layout.virtual_pipeline or 1) - 1,
            **({"vp_stage": piece} if layout.virtual_pipeline else {}),
        )
        parameters += sum(parameter.numel() for parameter in model.parameters())
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        buffers = DistributedDataParallel(built, ddp, model).buffers
        gradient_bytes += sum(buffer.grad_data.nbytes for buffer in buffers)
        shard += sum(buffer.grad_data.numel() // buffer.data_parallel_world_size for buffer in buffers)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return Built(parameters, gradient_bytes, 12 * shard)


def test_the_estimate_is_what_megatron_allocates() -> None:
    cases = _cases()
    (built,) = run_ranks(1, _build, cases)
    assert len(cases) > 15
    for case, real in zip(cases, built, strict=True):
        assert real.parameters == parameters_on(case.shape, case.layout, case.stage), case.name
        replicas = case.layout.data_parallel * case.layout.context_parallel
        estimated = 4 * parameters_on(case.shape, case.layout, case.stage)
        # Megatron pads each bucket of gradients so that the ranks' shards are aligned.
        assert estimated <= real.gradient_bytes <= 1.001 * estimated, case.name
        assert 3 * estimated / replicas <= real.optimizer_bytes <= 1.001 * 3 * estimated / replicas, case.name
