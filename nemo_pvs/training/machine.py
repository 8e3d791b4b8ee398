"""The machine that a run is built for: this one, or a cluster's node that this one prepares work for. No NeMo."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import dataclass
from functools import cache

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.planning.teacher import check_teacher
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training


@cache
def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


@dataclass(frozen=True)
class Machine:
    """What NeMo's objects depend on, beyond the run itself."""

    gpu: bool
    transformer_engine: bool
    bf16: bool
    """Whether it computes in bf16; elsewhere bf16 is slower than fp32."""
    processes_per_node: int = 1_000_000
    """Ranks that a node holds; a run without a cluster is on one node, however many there are."""

    @classmethod
    def here(cls) -> Machine:
        """Return this machine."""
        import torch

        if torch.cuda.is_available():
            bf16 = torch.cuda.is_bf16_supported()
        else:
            bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls(
            gpu=torch.cuda.is_available(),
            transformer_engine=has_transformer_engine(),
            bf16=bf16,
        )

    def precision(self, wanted: str) -> str:
        """Return bf16, fp32 or fp8: ``auto`` is bf16 where it is fast, else fp32.

        Raises:
            UserError: fp8 without the kernels for it.
        """
        if wanted == "fp8" and not (self.gpu and self.transformer_engine):
            raise UserError("precision is fp8, which needs a GPU and Transformer Engine; choose bf16.")
        if wanted != "auto":
            return wanted
        return "bf16" if self.bf16 else "fp32"

    def check(self, layout: Parallelism) -> None:
        """Refuse a layout whose kernels this machine has not.

        Raises:
            UserError: sequences are to be shared among ranks without Transformer Engine.
        """
        if layout.context_parallel > 1 and not self.transformer_engine:
            raise UserError(
                f"context_parallel is {layout.context_parallel}, which needs Transformer Engine; install it "
                "(pip install 'nemo-pvs[gpu]') or set 1."
            )


H100 = Machine(gpu=True, transformer_engine=True, bf16=True, processes_per_node=8)
"""A node of H100s with Transformer Engine, as in NVIDIA's containers; described, not looked at."""

H100_BYTES = 80e9
"""Memory of one GPU."""
_USABLE = 0.9  # the rest goes to NCCL's buffers, kernels' workspaces and fragmentation
_SIZES = (1, 2, 4, 8)
_PIECES = (4, 3, 2)  # of a pipeline stage; more make the bubble smaller and the exchanges more


def h100_layout(
    shape: Shape, training: Training, gpus: int, teacher: Shape | None = None
) -> tuple[Parallelism, list[str]]:
    """Return a layout for H100s and a line for each of its choices.

    The least communication that fits: data parallelism alone, then sequences shared within a node (context), then
    layers shared within a node (tensor, with sequence parallelism), then stages across nodes (pipeline).

    Raises:
        UserError: nothing fits on so many GPUs.
    """
    for pipeline, tensor, context in itertools.product(_SIZES, repeat=3):
        model = pipeline * tensor * context
        if tensor * context > H100.processes_per_node or gpus % model:
            continue
        layout = Parallelism(
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            virtual_pipeline=_pieces(shape, pipeline),
            context_parallel=context,
            data_parallel=gpus // model,
            sequence_parallel=tensor > 1,
        )
        try:
            shape.check_parallel(tensor_parallel=tensor, pipeline_parallel=pipeline)
            if teacher:
                check_teacher(teacher, shape, layout)
        except UserError:
            continue
        batches, rest = divmod(training.global_batch_size, training.micro_batch_size * layout.data_parallel)
        if rest or (layout.virtual_pipeline and batches % pipeline):
            continue
        needed = training_memory(shape, layout, training, teacher).total
        if needed <= _USABLE * H100_BYTES:
            return layout, _reasons(layout, needed)
    raise UserError(
        f"{shape} with batches of {training.global_batch_size} x {training.sequence_length} tokens does not fit on "
        f"{gpus} H100s in any layout; take another number of GPUs."
    )


def _pieces(shape: Shape, pipeline: int) -> int | None:
    """Return into how many pieces the layers of a stage are cut; None where there is one stage."""
    layers = shape.layers // pipeline
    return next((pieces for pieces in _PIECES if pipeline > 1 and layers % pieces == 0), None)


def _reasons(layout: Parallelism, needed: float) -> list[str]:
    def line(name: str, size: int | None, alone: str, shared: str) -> str:
        return f"{name} {size or 1}: {alone if (size or 1) == 1 else shared}"

    return [
        line("TP", layout.tensor_parallel, "no layer need be cut", "a layer is cut, its norms by sequence"),
        line("PP", layout.pipeline_parallel, "the layers fit, so no bubble", "the layers do not fit on fewer GPUs"),
        line("VPP", layout.virtual_pipeline, "nothing to interleave", "stages take turns, for a smaller bubble"),
        line("CP", layout.context_parallel, "a sequence fits", "the activations of one sequence are too large"),
        f"DP {layout.data_parallel}: the rest; gradients and the optimizer's state go over all of it",
        f"about {needed / 1e9:.0f} of {H100_BYTES / 1e9:.0f} GB a GPU",
    ]
