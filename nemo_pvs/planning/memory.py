"""Estimate GPU memory for training from the model's sizes, the layout and the batch; no GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of the pipeline stage that needs the most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass with the layout's recomputation, logits included."""
    activations_recomputed: float
    """The same with full recomputation, which keeps only the input of every layer."""
    teacher: float = 0.0
    """Weights of the teacher, and its hidden states that the student's loss needs."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher

    @property
    def total_recomputed(self) -> float:
        """The sum, with full recomputation."""
        return self.total - self.activations + self.activations_recomputed


def training_memory(shape: Shape, layout: Parallelism, training: Training, teacher: Shape | None = None) -> Memory:
    """Estimate the memory of the fullest GPU, without NCCL and kernel buffers and fragmentation.

    A parameter takes 2 bytes as a bf16 weight, 4 as an fp32 gradient and 12 in AdamW (fp32 copy and two moments; in
    fp32 training 4, 4 and 8), the latter sharded over the data- and context-parallel ranks by the distributed
    optimizer (ZeRO-1, Rajbhandari et al., 1910.02054, section 3). Activations are counted as in Korthikanti et al.
    (2205.05198, sections 4.1 to 4.3 and 5) for a layer with RMSNorm, grouped queries, fused attention and a gated MLP
    without dropout: per token ``4 d`` values that only sequence parallelism shards (the inputs of both norms, of qkv
    and of gate|up), and ``(2 H + 2 G) h + 3 f`` values that tensor parallelism shards (q, k, v, the attention's
    output, gate, up and their product). Selective recomputation keeps the last three of one layer at a time. Pipeline
    stage i of p keeps p - i micro-batches (1F1B); with v interleaved chunks per pipeline stage it keeps 2 (p - i - 1)
    + (v - 1) p + 1 of these chunks, which in the first pipeline stage is 1 + (p - 1) / (p v) times as much. The last
    pipeline stage has the logits, in whose place Transformer Engine's cross entropy writes their gradient. A distilled
    model has the divergence's gradient as well, and then Megatron's own cross entropy makes an fp32 copy of the
    logits; a teacher's logits, needed before that, are smaller than this copy. Precision ``auto`` counts as bf16,
    which GPUs use.

    A ``teacher`` adds its weights on every pipeline stage, and with several of them it adds its final hidden states
    for a whole step on the last one (``teacher.Teacher``). If hidden states are compared, those of each compared layer
    are added: for a whole step with several pipeline stages, else for a micro-batch.
    """
    ranks = range(layout.pipeline_parallel)
    return max((_memory_of(shape, layout, training, rank, teacher) for rank in ranks), key=lambda memory: memory.total)


def parameters_on(shape: Shape, layout: Parallelism, pipeline_rank: int) -> float:
    """Return the number of parameters on one rank of a pipeline stage: matrices are sharded, vectors whole."""
    layers = shape.with_layers(_layers_of(shape, layout, pipeline_rank))
    matrices, vectors = float(layers.matrix_parameters), layers.vector_parameters
    last = pipeline_rank == layout.pipeline_parallel - 1
    tables = (pipeline_rank == 0) + (last and not (shape.tied and pipeline_rank == 0))
    vectors += shape.hidden if last else 0
    return (matrices + tables * shape.vocab * shape.hidden) / layout.tensor_parallel + vectors


def _layers_of(shape: Shape, layout: Parallelism, pipeline_rank: int) -> tuple[LayerSizes, ...]:
    pieces = layout.virtual_pipeline or 1
    layers_of_each = shape.stage_layers(layout.pipeline_parallel, layout.first_stage_layers, layout.last_stage_layers)
    count = layers_of_each[pipeline_rank] // pieces
    starts = (
        piece * (shape.layers // pieces) + sum(layers_of_each[:pipeline_rank]) // pieces for piece in range(pieces)
    )
    return tuple(size for start in starts for size in shape.layer_sizes[start : start + count])


def _memory_of(
    shape: Shape, layout: Parallelism, training: Training, pipeline_rank: int, teacher: Shape | None
) -> Memory:
    micro_batch = layout.micro_batch_size or training.micro_batch_size
    value = 4 if training.precision == "fp32" else 2
    parameters = parameters_on(shape, layout, pipeline_rank)
    replicas = layout.data_parallel * layout.context_parallel if layout.distributed_optimizer else 1
    tensor = layout.tensor_parallel
    tokens = micro_batch * training.sequence_length / layout.context_parallel
    batches = training.global_batch_size // (micro_batch * layout.data_parallel)
    later, chunks = layout.pipeline_parallel - pipeline_rank - 1, layout.virtual_pipeline
    in_flight = float(min(later + 1, batches))
    if chunks:
        in_flight = min(2 * later + (chunks - 1) * layout.pipeline_parallel + 1, batches * chunks) / chunks
    whole = value * shape.hidden / (tensor if layout.sequence_parallel else 1)
    layers = _layers_of(shape, layout, pipeline_rank)
    kept = [4 * whole + value * (_attention_values(shape, sizes) + 3 * sizes.ffn) / tensor for sizes in layers]
    without_mlp = [4 * whole + value * _attention_values(shape, sizes) / tensor for sizes in layers]
    head = 0.0
    if pipeline_rank == layout.pipeline_parallel - 1:
        of_logit = 2 * value + 4 if training.distill else value
        head = 2 * whole + of_logit * shape.vocab / tensor
    of_teacher = 0.0
    if teacher:
        of_teacher = _of_teacher(teacher, layout, pipeline_rank, value, tokens, batches)
        held = tokens * (batches if layout.pipeline_parallel > 1 else 1)
        of_teacher += _of_hidden_states(shape, teacher, layout, training, value * held)
    activations = {
        "none": in_flight * sum(kept),
        "selective": in_flight * sum(without_mlp) + value * 3 * max(sizes.ffn for sizes in layers) / tensor,
        "full": in_flight * whole * len(kept) + max(kept),
    }
    return Memory(
        weights=value * parameters,
        gradients=4 * parameters,
        optimizer=(8 if value == 4 else 12) * parameters / replicas,
        activations=tokens * (activations[layout.recompute] + head),
        activations_recomputed=tokens * (activations["full"] + head),
        teacher=of_teacher,
    )


def _of_teacher(
    teacher: Shape, layout: Parallelism, pipeline_rank: int, value: int, tokens: float, batches: int
) -> float:
    """Return the bytes that a teacher takes on one rank.

    Args:
        teacher: Its shape.
        layout: The student's layout.
        pipeline_rank: Its pipeline stage, from 0.
        value: Bytes per value.
        tokens: Tokens per micro-batch on the rank.
        batches: Micro-batches per step.
    """
    whole = {"virtual_pipeline": None, "first_stage_layers": None, "last_stage_layers": None}
    equal = layout.model_copy(update=whole)  # as ``teacher.Teacher`` divides it
    needed = value * parameters_on(teacher, equal, pipeline_rank)
    if pipeline_rank == layout.pipeline_parallel - 1 > 0:
        shards = layout.tensor_parallel if layout.sequence_parallel else 1
        needed += batches * tokens * value * teacher.hidden / shards
    return needed


def _of_hidden_states(shape: Shape, teacher: Shape, layout: Parallelism, training: Training, held: float) -> float:
    """Return the bytes for the loss on hidden states, if all compared layers are on one rank.

    These are ``held`` bytes per channel of the teacher and compared layer, and the projection in fp32 with its
    gradient and two moments.
    """
    compared = training.distill.places if training.distill else 0
    if not compared:
        return 0.0
    shards = layout.tensor_parallel if layout.sequence_parallel else 1
    projection = 16 * shape.hidden * teacher.hidden if shape.hidden != teacher.hidden else 0
    return compared * held * teacher.hidden / shards + projection


def _attention_values(shape: Shape, sizes: LayerSizes) -> int:
    """Return the values per token of q, k, v and the attention's output."""
    return 2 * (sizes.heads + sizes.kv_groups) * shape.head_dim
