"""Distillation from hidden states: layers of the student are drawn to those of the teacher that they are paired with.

Muralidharan et al. (2407.14679, section 3.3) add to the divergence of logits, for k pairs of layers,
``1/k sum_pairs mean_tokens,channels (P h_student - h_teacher)^2``, where one linear map P, shared by all pairs and
learned meanwhile, widens the states of a student with fewer hidden channels. With as many channels there is none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed

Pairs = list[tuple[int, int]]
"""Number of a student's state and of the teacher's; 0 is what the embedding gives, n what layer n gives, from 1."""


class HiddenStates:
    """The loss of a rank's pairs, given to the student's gradient where its state is, and the map P.

    No pipeline stage sends a state to another: both of a pair are on the same one. P is no parameter of Megatron's
    model: every rank holds all of it in fp32 and takes the same step, by AdamW without weight decay at the student's
    learning rate, so it goes with a run to another layout and is no part of the model that is exported. It starts at
    zero, where it leaves the student alone until it has learned something.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        weight: float,
        widths: tuple[int, int],
        device: torch.device,
        betas: tuple[float, float] = (0.9, 0.95),
        replicas: int = 1,
        shards: int = 1,
    ) -> None:
        """Prepare.

        Args:
            pairs: All pairs of the model, those of other pipeline stages too.
            weight: Of the loss, beside the divergence of logits.
            widths: Hidden channels of student and teacher.
            device: Where P is.
            betas: Of P's AdamW.
            replicas: Ranks that have the same tokens and states, or other tokens that count alike: what a sum over
                all ranks has too much of.
            shards: Tensor parallel ranks that share the tokens of a state (sequence parallelism).
        """
        self.pairs = pairs
        self._weight = weight
        self._replicas = replicas
        self._shards = shards
        self._micro_batches = 1
        self._sum = torch.zeros((), device=device)
        self.map: torch.Tensor | None = None
        if widths[0] != widths[1]:
            self.map = torch.zeros(widths[1], widths[0], device=device)
            self.map.grad = torch.zeros_like(self.map)
            self._optimizer = torch.optim.AdamW([self.map], betas=betas, weight_decay=0.0)

    def begin(self, micro_batches: int) -> None:
        """Begin a training step of so many micro-batches, the same number on every rank."""
        self._micro_batches = micro_batches
        self._sum.zero_()

    def drawn(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return the student's state, whose gradient has the pair's part from here on.

        Args:
            student: State [tokens / shards, samples, d] of a pair, in the graph.
            teacher: The teacher's [tokens / shards, samples, D].
        """
        drawn: torch.Tensor = _WithGradient.apply(student, self._gradient(student, teacher).to(student.dtype))
        return drawn

    @torch.no_grad()
    def _gradient(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Add a pair's part of the loss and of the map's gradient, and return that of the student's state."""
        own = student.to(torch.promote_types(student.dtype, torch.float32))
        difference = (own if self.map is None else own @ self.map.to(own.dtype).T) - teacher
        everything = difference.numel() * self._shards * len(self.pairs) * self._micro_batches
        self._sum += difference.square().sum() / everything
        gradient = difference * (2 * self._weight / everything)
        if self.map is not None and self.map.grad is not None:
            self.map.grad += (gradient.flatten(0, -2).T @ own.flatten(0, -2)).to(self.map.dtype)
            gradient = gradient @ self.map.to(own.dtype)
        return gradient

    def loss(self) -> torch.Tensor:
        """Return the loss of the step over all pairs and tokens, unweighted; a collective of all ranks."""
        return self._over_ranks(self._sum.clone())

    def learn(self, rate: float) -> None:
        """Take P's step at a learning rate; a collective of all ranks."""
        if self.map is None or self.map.grad is None:
            return
        self._over_ranks(self.map.grad)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self.map.grad.zero_()

    def _over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if distributed.is_initialized():
            distributed.all_reduce(tensor)
        return tensor.div_(self._replicas)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run goes on with; the same on every rank."""
        return {} if self.map is None else {"map": self.map, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what an interrupted run had."""
        if self.map is not None:
            self.map.copy_(state["map"])
            self._optimizer.load_state_dict(state["optimizer"])


class _WithGradient(torch.autograd.Function):
    """Passes a tensor on, and adds to its gradient what a loss that is computed elsewhere has for it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return gradients[0] + own, None


def draw(
    model: torch.nn.Module,
    states: HiddenStates,
    teacher: Mapping[int, deque[torch.Tensor]],
    active: Callable[[], bool],
) -> None:
    """Draw a student's states to the teacher's, wherever this part of the model has one of a pair.

    Args:
        model: Megatron's GPTModel, or the part of it of a pipeline stage or a piece of one.
        states: The loss.
        teacher: The teacher's states by number, a micro-batch after the other; taken from the left.
        active: Returns whether this is a training step.
    """

    def towards(number: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
            if not active():
                return output
            whole = output if isinstance(output, tuple) else (output,)
            drawn = states.drawn(whole[0], teacher[number].popleft())
            return (drawn, *whole[1:]) if isinstance(output, tuple) else drawn

        return hook

    for own, its in states.pairs:
        if module := state_module(model, own):
            module.register_forward_hook(towards(its))


def keep(model: torch.nn.Module, states: Mapping[int, deque[torch.Tensor]]) -> None:
    """Put a teacher's states into queues as its forward passes make them."""

    def into(queue: deque[torch.Tensor]) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            queue.append((output[0] if isinstance(output, tuple) else output).detach())

        return hook

    for number, queue in states.items():
        if module := state_module(model, number):
            module.register_forward_hook(into(queue))


def state_module(model: Any, number: int) -> torch.nn.Module | None:
    """Return what gives a state of Megatron's GPTModel; None where this part of it has it not."""
    if number == 0:
        return model.embedding if model.pre_process else None
    return next((layer for layer in model.decoder.layers if layer.layer_number == number), None)
