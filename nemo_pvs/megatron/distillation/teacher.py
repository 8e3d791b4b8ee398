"""The teacher of distillation: a frozen model on the ranks, TP and PP of the run that it teaches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from torch import distributed

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.megatron.inference import LoadedModel

Batch = Any
"""A micro-batch as the data loader yields it, before a data step makes tensors on the device of it."""
DataStep = Callable[[Iterator[Batch]], dict[str, torch.Tensor]]
EMBEDDING = 0
"""The place behind the embedding; place n is behind layer n, counted from 1."""


class Teacher:
    """A model that is asked for its logits of the micro-batches of a training step, and never changes.

    It is no part of the student's module: not in its checkpoints, its optimizer or its gradient buffers. Without
    pipeline parallelism a micro-batch goes through it when its logits are wanted. With it, all micro-batches of a step
    go through the teacher's stages before the student's first, in Megatron's own schedule for forward passes alone;
    what waits on the last stage are final hidden states, ``hidden`` values a token instead of the many of its logits,
    and the output head is applied when the student's micro-batch is there. Layers are shared out evenly among the
    stages, also where the student's stages take turns (virtual pipeline).

    It may be asked for hidden states as well. Stages that have them send them to the stages that asked, all
    micro-batches of a step at once, before the student's first.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        sequence_parallel: bool,
        places: Collection[int] = (),
    ) -> None:
        """Build this rank's part and load its weights.

        Args:
            source: The checkpoint, of any format.
            dtype: Type of weights and arithmetic.
            device: Where the student is.
            sequence_parallel: As the student has it.
            places: Where hidden states will be asked for, on any stage.
        """
        loaded = LoadedModel(source, dtype=dtype, device=device, sequence_parallel=sequence_parallel)
        self.model = loaded.model.requires_grad_(False)
        self._pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
        self._hidden: Iterator[torch.Tensor] = iter(())
        self._ahead: deque[torch.Tensor] = deque()
        self._dtype, self._device, self._sequence_parallel = dtype, device, sequence_parallel
        self._states: dict[int, deque[torch.Tensor]] = {place: deque() for place in sorted(places)}
        self._moves: list[tuple[int, int, int]] = []
        here = places_of(self.model)
        self._here = self._states.keys() & here.keys()
        for place in self._here:
            here[place].register_forward_hook(self._keep(place))
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
        self._ahead.clear()
        for states in self._states.values():
            states.clear()
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
        length = sequence_length
        if self._sequence_parallel:
            length //= parallel_state.get_tensor_model_parallel_world_size()
        self._send((len(batches), length, micro_batch_size, self.model.config.hidden_size))

    def deliver(self, places: Collection[int]) -> None:
        """Bring the hidden states of these places to this stage from now on; to be called on all stages together."""
        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[Any] = [None] * group.size()
        distributed.all_gather_object(stages, (self._here, set(places)), group=group)
        for place in self._states:
            (source,) = (stage for stage, (said, _) in enumerate(stages) if place in said)
            (target,) = (stage for stage, (_, asked) in enumerate(stages) if place in asked)
            if source != target:
                self._moves.append((place, source, target))

    def states(self, place: int) -> torch.Tensor:
        """Return the hidden states [s, b, d] of a place for the next micro-batch; of a part of s as the student has.

        Each place has its own next one. To be called on the stage that asked for it.
        """
        if not self._states[place]:  # nothing has been read ahead: there is no pipeline
            self._ahead.append(next(self._hidden))
        return self._states[place].popleft()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Return the logits [s, b, V / TP] of the next micro-batch; to be called on the last stage."""
        hidden = self._ahead.popleft() if self._ahead else next(self._hidden)
        logits, _ = self.model.output_layer(hidden, weight=self._head_weight)
        return logits

    def _keep(self, place: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._states[place].append(output[0] if isinstance(output, tuple) else output)

        return keep

    def _send(self, shape: tuple[int, ...]) -> None:
        """Send states [micro-batch, s, b, d] between stages; all go through the moves in one order, so none waits."""
        group = parallel_state.get_pipeline_model_parallel_group()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        for place, source, target in self._moves:
            if stage == source:
                said = torch.stack(list(self._states[place]))
                distributed.send(said, distributed.get_global_rank(group, target), group=group)
                self._states[place].clear()
            elif stage == target:
                said = torch.empty(shape, dtype=self._dtype, device=self._device)
                distributed.recv(said, distributed.get_global_rank(group, source), group=group)
                self._states[place].extend(said)

    @torch.no_grad()
    def _forward(self, data: Iterator[Batch], data_step: DataStep) -> torch.Tensor:
        batch = data_step(data)
        return self.model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))


def _as_it_is(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    """Be the loss function of a schedule that collects outputs."""
    return output


def places_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Return the modules of this rank whose outputs are the places of a GPTModel, or of a piece of one."""
    layers: dict[int, torch.nn.Module] = {layer.layer_number: layer for layer in model.decoder.layers}
    return {EMBEDDING: model.embedding, **layers} if model.pre_process else layers
