"""Distillation of the teacher's hidden states, on the ranks that hold the student's, inside a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed

from nemo_pvs.megatron.distillation.losses import hidden_loss, initial_projection
from nemo_pvs.megatron.distillation.teacher import EMBEDDING, Teacher, places_of
from nemo_pvs.pruning.learned.mask_learning import on_cpu


class HiddenStates:
    """Adds the gradient of losses between hidden states of student and teacher to that of the student's states.

    A "place" is where hidden states are compared: 0 is the output of the embedding, n that of layer n, from 1.

    The loss of a place is computed on the pipeline stage where the student has this place. Its gradient is added to
    the one that flows back from the layers above, so Megatron's schedules, optimizer and loss need no change. The
    teacher's states are sent there if they are computed on another. Each loss is a mean over the tokens of a
    micro-batch, as the LM loss is.

    With a dynamic weight the losses are scaled by Minitron's ``alpha = L_logits / L_is`` (2407.14679, section 3.2), a
    constant without gradient. It comes from the losses of the previous step, over all ranks, because a pipeline stage
    finishes its part of a step before the last one knows the divergence. So it is 0 in the first step of a run.

    The projection is not part of the model. Every rank holds all of it in fp32 with its own Adam, at the learning rate
    of the weights and without decay, and takes the same step with a gradient summed over all ranks; so an interrupted
    run can resume at another TP x PP x DP. The reported gradient norm does not include it.
    """

    def __init__(
        self,
        teacher: Teacher,
        students: list[torch.nn.Module],
        *,
        pairs: list[tuple[int, int]],
        hidden_weight: float,
        embedding_weight: float,
        kind: str,
        dynamic: bool,
        betas: tuple[float, float],
        seed: int,
    ) -> None:
        """Install hooks at the student's places on this rank.

        Args:
            teacher: Built with all ``places`` that ``pairs`` and ``embedding_weight`` need.
            students: The GPTModel of this rank, or its chunks in a virtual pipeline.
            pairs: (student, teacher) layers whose outputs are compared, counted from 1.
            hidden_weight: Weight of the sum over ``pairs``.
            embedding_weight: Weight of the loss of the embeddings' outputs.
            kind: Kind of ``hidden_loss``.
            dynamic: Scale the losses to the size of the divergence.
            betas: Betas of the projection's Adam.
            seed: Seed for the projection's initial values.

        Raises:
            RuntimeError: the model's config has per-token losses or full recomputation.
        """
        self._teacher, self._kind = teacher, kind
        self._alpha = 0.0 if dynamic else 1.0
        self._dynamic = dynamic
        self._hidden_weight, self._embedding_weight = hidden_weight, embedding_weight
        self._weights = dict.fromkeys([ours for ours, _ in pairs], hidden_weight) | {EMBEDDING: embedding_weight}
        self._pairs = {ours: theirs for ours, theirs in [(EMBEDDING, EMBEDDING), *pairs] if self._weights[ours]}
        config = students[0].config
        if config.calculate_per_token_loss or config.recompute_granularity == "full":
            raise RuntimeError(
                "Losses of hidden states do not support calculate_per_token_loss or full recomputation; switch it off."
            )
        self._sequence_parallel = config.sequence_parallel
        device = torch.device(torch.cuda.current_device())
        width, theirs = config.hidden_size, teacher.model.config.hidden_size
        self.projection: torch.Tensor | None = None
        if width != theirs:
            self.projection = initial_projection(width, theirs, seed).to(device).requires_grad_()
            self._optimizer = torch.optim.Adam([self.projection], betas=betas)
        self._masks: dict[int, Iterator[torch.Tensor]] = {}
        self._sums = torch.zeros(2, device=device)
        local = {place: module for student in students for place, module in places_of(student).items()}
        for place in self._pairs.keys() & local.keys():
            local[place].register_forward_hook(self._hook(place))
        teacher.deliver({self._pairs[place] for place in self._pairs.keys() & local.keys()})

    def begin(self, masks: list[torch.Tensor]) -> None:
        """Start a step with the loss masks [b, s] of its micro-batches, after the teacher has read these."""
        ready = [mask.to(self._sums.device).float().transpose(0, 1) / mask.sum().clamp(min=1) for mask in masks]
        if self._sequence_parallel:
            ranks, rank = _tensor_ranks(), parallel_state.get_tensor_model_parallel_rank()
            ready = [mask.chunk(ranks)[rank] for mask in ready]
        self._micro_batches = len(ready)
        self._masks = {place: iter(ready) for place in self._pairs}
        self._sums.zero_()

    def end(self, divergence: float) -> tuple[float, float]:
        """End the step; forward passes until the next ``begin`` are not compared.

        Args:
            divergence: Weighted divergence of the step, the same on every rank.

        Returns:
            The step's loss summed over layers, and that of the embedding.
        """
        self._masks = {}
        layers, embedding = self._over_ranks(self._sums.clone()).tolist()
        weighted = self._hidden_weight * layers + self._embedding_weight * embedding
        if self._dynamic and weighted > 0:
            self._alpha = divergence / weighted
        return layers, embedding

    def learn(self, rate: float) -> None:
        """Update the projection at a learning rate; call it on all ranks."""
        if self.projection is None:
            return
        gradient = self.projection.grad
        self.projection.grad = self._over_ranks(torch.zeros_like(self.projection) if gradient is None else gradient)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of alpha, the projection and its moments, as far as they exist; the same on every rank."""
        state: dict[str, Any] = {"alpha": self._alpha} if self._dynamic else {}
        if self.projection is not None:
            state |= {"projection": self.projection.detach(), "optimizer": self._optimizer.state_dict()}
        return on_cpu(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that an interrupted run has saved."""
        if self._dynamic:
            self._alpha = state["alpha"]
        if self.projection is not None:
            with torch.no_grad():
                self.projection.copy_(state["projection"])
            self._optimizer.load_state_dict(state["optimizer"])

    def _hook(self, place: int) -> Any:
        weight = self._weights[place]

        def compare(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if place not in self._masks:  # not a training step
                return
            states = output[0] if isinstance(output, tuple) else output
            mask, theirs = next(self._masks[place]), self._teacher.states(self._pairs[place])
            ours = states.detach().requires_grad_()
            with torch.enable_grad():
                losses = hidden_loss(ours, theirs, self.projection, kind=self._kind)
                loss = (losses * mask).sum() / self._micro_batches
            self._sums[int(place == EMBEDDING)] += loss.detach()
            (self._alpha * weight * loss).backward()  # type: ignore[no-untyped-call]
            gradient = ours.grad
            states.register_hook(lambda from_above: from_above + gradient)

        return compare

    def _over_ranks(self, parts: torch.Tensor) -> torch.Tensor:
        """Sum over pipeline stages and sequence shards, average over replicas; copies on tensor ranks count once."""
        if not self._sequence_parallel:
            parts /= _tensor_ranks()
        distributed.all_reduce(parts)
        return parts.div_(parallel_state.get_data_parallel_world_size(with_context_parallel=True))


def _tensor_ranks() -> int:
    return int(parallel_state.get_tensor_model_parallel_world_size())
