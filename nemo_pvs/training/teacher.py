"""The teacher of distillation: a frozen model on the ranks, TP and PP of the run that it teaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.training.inference import LoadedModel

Batch = Any
"""A micro-batch as the data loader yields it, before a data step makes tensors on the device of it."""
DataStep = Callable[[Iterator[Batch]], dict[str, torch.Tensor]]


class Teacher:
    """A model that is asked for its logits of the micro-batches of a training step, and never changes.

    It is no part of the student's module: not in its checkpoints, its optimizer or its gradient buffers. Without
    pipeline parallelism a micro-batch goes through it when its logits are wanted. With it, all micro-batches of a step
    go through the teacher's stages before the student's first, in Megatron's own schedule for forward passes alone;
    what waits on the last stage are final hidden states, ``hidden`` values a token instead of the many of its logits,
    and the output head is applied when the student's micro-batch is there. Layers are shared out evenly among the
    stages, also where the student's stages take turns (virtual pipeline).
    """

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, device: torch.device, sequence_parallel: bool
    ) -> None:
        """Build this rank's part and load its weights.

        Args:
            source: The checkpoint, of any format.
            dtype: Type of weights and arithmetic.
            device: Where the student is.
            sequence_parallel: As the student has it.
        """
        loaded = LoadedModel(source, dtype=dtype, device=device, sequence_parallel=sequence_parallel)
        self.model = loaded.model.requires_grad_(False)
        self._pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
        self._hidden: Iterator[torch.Tensor] = iter(())
        if parallel_state.is_pipeline_last_stage():
            tied = self.model.share_embeddings_and_output_weights
            self._head_weight = self.model.shared_embedding_or_output_weight() if tied else None
            self.model.post_process = False  # ends with the final norm from now on; logits() is the head

    @torch.no_grad()
    def read(self, batches: list[Batch], data_step: DataStep, *, sequence_length: int, micro_batch_size: int) -> None:
        """Take the micro-batches of a step, all stages together.

        Args:
            batches: In the order in which the student reads them.
            data_step: The student's.
            sequence_length: Tokens a sequence.
            micro_batch_size: Sequences a micro-batch.
        """
        data = iter(batches)
        if not self._pipelined:
            self._hidden = (self._forward(data, data_step) for _ in batches)
            return
        self._hidden = iter(
            forward_backward_pipelining_without_interleaving(
                forward_step_func=lambda data, model: (self._forward(data, data_step), _as_it_is),
                data_iterator=data,
                model=self.model,
                num_microbatches=len(batches),
                seq_length=sequence_length,
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        )

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Return the logits [s, b, V / TP] of the next micro-batch; to be called on the last stage."""
        logits, _ = self.model.output_layer(next(self._hidden), weight=self._head_weight)
        return logits

    def _forward(self, data: Iterator[Batch], data_step: DataStep) -> torch.Tensor:
        batch = data_step(data)
        return self.model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))


def _as_it_is(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    """Be the loss function of a schedule that collects outputs."""
    return output
