"""Building blocks of a recipe: bounded numbers, and the parallel layout of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _whole(value: float) -> int:
    if not value.is_integer():  # nor is infinity
        raise ValueError("must be a whole number")
    return int(value)


Tokens = Annotated[float, Field(ge=0), AfterValidator(_whole)]
"""A number of tokens; 200e9 means 200000000000."""
Budget = Annotated[float, Field(ge=1), AfterValidator(_whole)]
"""The tokens of a training run."""
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Initialisation = Literal["pruned", "random"]
"""An arm's initial weights: the pruned parent (R_N in arXiv 2606.14150), or random (S_N)."""


Recompute = Literal["none", "selective", "full"]


class RecipeBlock(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Parallelism(RecipeBlock):
    """How one training run is spread over processes."""

    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    virtual_pipeline: Positive | None = None
    """Model chunks per pipeline stage (interleaved schedule), which divides the pipeline bubble by this number."""
    first_stage_layers: Positive | None = None
    """Layers of the first pipeline stage, if they are not equal."""
    last_stage_layers: Positive | None = None
    """Layers of the last pipeline stage, if they are not equal."""
    context_parallel: Positive = 1
    """Ranks that share every sequence; needs Transformer Engine."""
    data_parallel: Positive = 1
    sequence_parallel: bool = False
    tp_overlap: bool | None = Field(default=None, exclude_if=lambda given: given is None)
    """Overlap the communication of tensor parallel layers with their computation (Transformer Engine's userbuffers);
    needs ``sequence_parallel``, and not with FP8. By default it is on where the GPUs support CUDA multicast."""
    distributed_optimizer: bool = True
    micro_batch_size: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Sequences per forward pass of a rank, instead of ``train.micro_batch_size``."""
    recompute: Recompute = Field(default="none", exclude_if=lambda given: given == "none")
    """Activations that the backward pass computes again instead of keeping them. selective: inside the MLP, the most
    bytes for the least work. full: everything but the input of each layer, a third more FLOPs."""

    @property
    def processes(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    @property
    def split(self) -> dict[str, Any]:
        """How the layout splits a model: the arguments of ``Shape.check_parallel``."""
        names = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "first_stage_layers", "last_stage_layers")
        return {name: getattr(self, name) for name in names}


def number(text: str) -> float | None:
    """Return ``text`` as a number, or None if it is not one."""
    try:
        return float(text)
    except ValueError:
        return None
