"""The machine that a run is built for: this one, or a node of the cluster that it is submitted to. Imports no NeMo."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.gpu_time import H100_BYTES, USABLE_BYTES
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.planning.teacher import check_teacher
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system import transformer_engine
from nemo_pvs.training.launcher import gpus_of_each


def has_transformer_engine() -> bool:
    """Return whether models can be built of Transformer Engine's layers: it can be imported, and there is a GPU."""
    return transformer_engine_problem() is None


def transformer_engine_problem() -> str | None:
    """Return why Transformer Engine cannot be used here, in one line; None if it can."""
    import torch

    if not torch.cuda.is_available():  # its layers run on GPUs only, wherever it is installed
        return "this machine has no GPU that PyTorch can use"
    return transformer_engine.import_problem()


def has_multicast() -> bool:
    """Return whether tensor parallel overlap can use CUDA multicast here; Transformer Engine checks the same."""
    if not has_transformer_engine():
        return False
    return bool(importlib.import_module("transformer_engine_torch").device_supports_multicast())


@dataclass(frozen=True)
class Machine:
    """Properties of the hardware on which NeMo's configuration depends."""

    gpu: bool
    transformer_engine: bool
    bf16: bool
    """Whether it has bf16 arithmetic; without it bf16 is slower than fp32."""
    processes_per_node: int = 1_000_000
    """Ranks per node; without a cluster all ranks of a run are on one node."""
    multicast: bool | None = None
    """Whether its GPUs, their driver and their switches support CUDA multicast; None if that is not known."""

    @classmethod
    def here(cls) -> Machine:
        """Detect the properties of this machine."""
        import torch

        if torch.cuda.is_available():
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return cls(
            gpu=torch.cuda.is_available(),
            transformer_engine=has_transformer_engine(),
            bf16=bf16,
            multicast=torch.cuda.is_available() and has_multicast(),
        )

    def precision(self, setting: str) -> str:
        """Return bf16, fp32 or fp8 for a recipe's ``precision``; ``auto`` is bf16 where it is fast, otherwise fp32.

        Raises:
            UserError: the setting is fp8, and the machine has no kernels for it.
        """
        if setting == "fp8" and not (self.gpu and self.transformer_engine):
            raise UserError(
                "precision is fp8, which needs a GPU and Transformer Engine; run pvs doctor to see what is missing, "
                "or choose bf16."
            )
        if setting != "auto":
            return setting
        return "bf16" if self.bf16 else "fp32"

    def tp_overlap(self, layout: Parallelism, precision: str) -> bool:
        """Return whether tensor parallel communication is to overlap with computation.

        Not with FP8: NeMo keeps the first and the last layer in bf16, for quality, but Transformer Engine's buffers
        are set up for either FP8 or bf16, and a layer of the other kind fails. Having all layers in FP8 instead would
        change what is learned for the sake of speed.

        Args:
            layout: The run's layout.
            precision: bf16, fp32 or fp8.
        """
        possible = self.gpu and self.transformer_engine and precision != "fp8"
        sharded = layout.sequence_parallel and layout.tensor_parallel > 1
        wanted = bool(self.multicast) if layout.tp_overlap is None else layout.tp_overlap
        return possible and sharded and wanted

    def check(self, layout: Parallelism) -> None:
        """Check that this machine has the kernels that a layout needs.

        Raises:
            UserError: the layout has context parallelism, and Transformer Engine cannot be used, or its communication
                is to overlap, and the GPUs have no multicast.
        """
        if layout.context_parallel > 1 and not self.transformer_engine:
            raise UserError(
                f"context_parallel is {layout.context_parallel}, which needs Transformer Engine; run pvs "
                "doctor to see why it cannot be used here, or set 1."
            )
        if layout.tp_overlap and self.gpu and self.transformer_engine and self.multicast is False:
            raise UserError(
                "tp_overlap is true, which needs CUDA multicast, but pvs doctor finds none among the GPUs here; leave "
                "tp_overlap out."
            )


def check_gpus(name: str, layout: Parallelism, gpus: int, *, jobs: int | None = None) -> None:
    """Refuse a run that needs more ranks than there are GPUs for it.

    Args:
        name: Name of the run, for the message.
        layout: Its layout.
        gpus: Number of GPUs that it gets.
        jobs: Number of runs that share the GPUs of this machine; None if each has all of them.

    Raises:
        UserError: it needs more.
    """
    if layout.processes <= gpus:
        return
    if jobs is None:
        found = f"this machine has {gpus} GPU{'s' * (gpus > 1)}"
        instead = "set CUDA_VISIBLE_DEVICES= to train on the CPU, or run it elsewhere with --launch"
    else:
        found, instead = f"with --jobs {jobs} it gets {gpus} of this machine's GPUs", "or give fewer --jobs"
    raise UserError(f"{name} needs {layout.processes} ranks, but {found}; change its layout, {instead}.")


def check_here(name: str, layout: Parallelism, training: Training, jobs: int | None = None) -> None:
    """Refuse a run that this machine cannot train; without GPUs, ranks share the CPU.

    Args:
        name: Name of the run, for the message.
        layout: Its layout.
        training: Its options.
        jobs: As for ``check_gpus``.

    Raises:
        UserError: the machine lacks GPUs, or kernels that the layout or the precision needs.
    """
    machine = Machine.here()
    machine.check(layout)
    machine.precision(training.precision)
    if machine.gpu:
        check_gpus(name, layout, gpus_of_each(jobs or 1), jobs=jobs)


H100 = Machine(gpu=True, transformer_engine=True, bf16=True, processes_per_node=8)
"""A node of H100s with Transformer Engine, as in NVIDIA's containers; fixed values, not detected."""

_SIZES = (1, 2, 4, 8)
_PIECES = (4, 3, 2)  # chunks per pipeline stage; more chunks mean a smaller bubble and more communication


def h100_layout(
    shape: Shape, training: Training, gpus: int, teacher: Shape | None = None
) -> tuple[Parallelism, list[str]]:
    """Return a layout for H100s and a line that explains each of its choices.

    It is the layout with the least communication that fits into memory. In this order it adds to data parallelism:
    context parallelism within a node, tensor parallelism (with sequence parallelism) within a node, and pipeline
    parallelism across nodes.

    Args:
        shape: Shape of the model.
        training: Options of the training.
        gpus: Number of GPUs.
        teacher: Shape of the teacher of a distilled run.

    Raises:
        UserError: no layout fits on this number of GPUs.
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
        if needed <= USABLE_BYTES:
            return layout, _reasons(layout, needed)
    raise UserError(
        f"{shape} with batches of {training.global_batch_size} x {training.sequence_length} tokens does not fit on "
        f"{gpus} H100s in any layout; choose another number of GPUs."
    )


def _pieces(shape: Shape, pipeline: int) -> int | None:
    """Return the chunks of a pipeline stage for a virtual pipeline; None if there is one, or none divides it."""
    layers = shape.layers // pipeline
    return next((pieces for pieces in _PIECES if pipeline > 1 and layers % pieces == 0), None)


def _reasons(layout: Parallelism, needed: float) -> list[str]:
    def line(name: str, size: int | None, alone: str, shared: str) -> str:
        return f"{name} {size or 1}: {alone if (size or 1) == 1 else shared}"

    return [
        line("TP", layout.tensor_parallel, "no layer has to be sharded", "layers are sharded, norms by sequence"),
        line("PP", layout.pipeline_parallel, "the layers fit, so no bubble", "the layers do not fit on fewer GPUs"),
        line("VPP", layout.virtual_pipeline, "nothing to interleave", "stages take turns, for a smaller bubble"),
        line("CP", layout.context_parallel, "a sequence fits", "the activations of one sequence are too large"),
        f"DP {layout.data_parallel}: the rest; gradients are reduced and optimizer state is sharded over it",
        f"about {needed / 1e9:.0f} of {H100_BYTES / 1e9:.0f} GB per GPU",
    ]
