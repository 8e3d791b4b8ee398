"""The teacher of distillation: a frozen model on the student's ranks, with its TP and PP."""

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
from nemo_pvs.system.transformer_engine import without_fp8

Batch = Any
"""A micro-batch as the data loader yields it, before a data step moves it to the device."""
DataStep = Callable[[Iterator[Batch]], dict[str, torch.Tensor]]
EMBEDDING = 0
"""The place of the embedding's output; place n is the output of layer n, counted from 1."""


class Teacher:
    """A frozen model that computes logits, and hidden states if requested, for the micro-batches of a training step.

    It is not part of the student's module, so neither of its checkpoints, optimizer or gradient buffers. Without
    pipeline parallelism, each micro-batch goes through the teacher when its logits are needed. With pipeline
    parallelism, all micro-batches of a step go through the teacher before the student's first one, in Megatron's
    forward-only schedule. The last pipeline stage then keeps the final hidden states, which are much smaller than
    logits, and applies the output head when the student reaches the micro-batch. Layers are split evenly over the
    pipeline stages, even if the student uses a virtual pipeline.

    Hidden states are sent from the teacher's pipeline stage to the one that requested them, for all micro-batches of a
    step at once, before the student's first one.
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
            device: The student's device.
            sequence_parallel: Whether the student uses sequence parallelism.
            places: Places whose hidden states any pipeline stage will request.
        """
        loaded = LoadedModel(source, dtype=dtype, device=device, sequence_parallel=sequence_parallel)
        self.model = loaded.model.requires_grad_(False)
        self.vocab = loaded.shape.vocab
        self._pipelined = parallel_state.get_pipeline_model_parallel_world_size() > 1
        self._hidden: Iterator[torch.Tensor] = iter(())
        self._ahead: deque[torch.Tensor] = deque()
        self._dtype, self._device, self._sequence_parallel = dtype, device, sequence_parallel
        self._states: dict[int, deque[torch.Tensor]] = {place: deque() for place in sorted(places)}
        self._moves: list[tuple[int, int, int]] = []
        modules = places_of(self.model)
        self._local_places = self._states.keys() & modules.keys()
        for place in self._local_places:
            modules[place].register_forward_hook(self._keep(place))
        if parallel_state.is_pipeline_last_stage():
            tied = self.model.share_embeddings_and_output_weights
            self._head_weight = self.model.shared_embedding_or_output_weight() if tied else None
            self.model.post_process = False  # the model now ends with the final norm; logits() applies the head

    @torch.no_grad()
    def read(self, batches: list[Batch], data_step: DataStep, *, sequence_length: int, micro_batch_size: int) -> None:
        """Read the micro-batches of a step; call it on all pipeline stages.

        Args:
            batches: Micro-batches in the order in which the student reads them.
            data_step: The student's data step.
            sequence_length: Tokens per sequence.
            micro_batch_size: Sequences per micro-batch.
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
                forward_step_func=lambda data, model: (self._forward(data, data_step), _identity),
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

    def inputs(self, data: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for the next micro-batch of tokens [b, s]: a data step for plain tokens."""
        tokens = next(data).to(self._device)
        return {"tokens": tokens, "position_ids": torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)}

    def deliver(self, places: Collection[int]) -> None:
        """Send the hidden states of these places to this pipeline stage in every step; call it on all of them."""
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks: list[Any] = [None] * group.size()
        distributed.all_gather_object(ranks, (self._local_places, set(places)), group=group)
        for place in self._states:
            (source,) = (rank for rank, (computed, _) in enumerate(ranks) if place in computed)
            (target,) = (rank for rank, (_, requested) in enumerate(ranks) if place in requested)
            if source != target:
                self._moves.append((place, source, target))

    def states(self, place: int) -> torch.Tensor:
        """Return the hidden states [s, b, d] of a place for its next micro-batch, where they were requested.

        With sequence parallelism s counts this rank's part of the sequence only.
        """
        if not self._states[place]:  # nothing is computed in advance without a pipeline
            self._ahead.append(next(self._hidden))
        return self._states[place].popleft()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Return the logits [s, b, V / TP] of the next micro-batch; call it on the last pipeline stage."""
        hidden = self._ahead.popleft() if self._ahead else next(self._hidden)
        logits, _ = self.model.output_layer(hidden, weight=self._head_weight)
        return logits

    def _keep(self, place: int) -> Callable[..., None]:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._states[place].append(output[0] if isinstance(output, tuple) else output)

        return keep

    def _send(self, shape: tuple[int, ...]) -> None:
        """Send states [micro-batch, s, b, d] between pipeline stages, in the same order on all: no deadlock."""
        group = parallel_state.get_pipeline_model_parallel_group()
        rank = parallel_state.get_pipeline_model_parallel_rank()
        for place, source, target in self._moves:
            if rank == source:
                states = torch.stack(list(self._states[place]))
                distributed.send(states, distributed.get_global_rank(group, target), group=group)
                self._states[place].clear()
            elif rank == target:
                states = torch.empty(shape, dtype=self._dtype, device=self._device)
                distributed.recv(states, distributed.get_global_rank(group, source), group=group)
                self._states[place].extend(states)

    @torch.no_grad()
    def _forward(self, data: Iterator[Batch], data_step: DataStep) -> torch.Tensor:
        batch = data_step(data)
        with without_fp8():  # the student may have reached a layer that it computes in FP8
            return self.model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))


def _identity(output: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    """Return the output itself, as the loss function of a schedule that collects outputs."""
    return output


def places_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """Return the modules of a GPTModel, or of a chunk of one, whose outputs are its places."""
    layers: dict[int, torch.nn.Module] = {layer.layer_number: layer for layer in model.decoder.layers}
    return {EMBEDDING: model.embedding, **layers} if model.pre_process else layers
