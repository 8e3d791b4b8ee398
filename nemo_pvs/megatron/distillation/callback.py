"""The callback that distils a teacher into a student, inside NeMo's training loop.

NeMo has its own distillation (2.7.3, ``llm.modelopt.distill``), whose divergence equals ours at temperature 1. But its
teacher must be a NeMo checkpoint, not a Hugging Face folder; paired hidden states must both be on the last pipeline
stage; virtual pipelines are not supported; and its options include no temperature, no top-k and no loss of embeddings.
It also has its own model class, which our other training callbacks (masks, gates, pruning) would have to support.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import nemo_run as run
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from nemo.lightning._strategy_lib import _sync_from_last_pipeline_stage
from nemo.lightning.io import IOMixin
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.megatron.distillation.answers import answers_in
from nemo_pvs.megatron.distillation.hidden_states import HiddenStates
from nemo_pvs.megatron.distillation.losses import vocabulary_parallel_kl
from nemo_pvs.megatron.distillation.teacher import EMBEDDING, Teacher
from nemo_pvs.megatron.distillation.top_k import top_k_answers, top_k_kl
from nemo_pvs.training.job import TrainingJob

KL = "train_kl"
HIDDEN, EMBEDDINGS = "train_hidden", "train_embedding"
"""Names of the divergence and of the losses of hidden states among Lightning's metrics."""


def distill(job: TrainingJob) -> list[run.Config]:
    """Return the distillation callback of a job; an empty list if it trains on labels alone."""
    how = job.training.distill
    if how is None:
        return []
    return [
        run.Config(
            Distill,
            teacher=str(job.teacher),
            temperature=how.temperature,
            top_k=how.kept,
            rest=how.rest,
            cached=job.cache is not None,
            lm_weight=how.lm_weight,
            kl_weight=how.kl_weight,
            hidden_weight=how.hidden_weight,
            embedding_weight=how.embedding_weight,
            layer_pairs=[list(pair) for pair in how.layer_pairs],
            hidden_loss=how.hidden_loss,
            dynamic_weight=how.dynamic_weight,
            betas=list(job.training.adam_betas),
            seed=job.training.seed,
        )
    ]


class Distill(pl.Callback, IOMixin):
    """Train on ``lm_weight * LM loss + kl_weight * T^2 KL(teacher || student)``, each a mean over the tokens.

    In training, the student's model computes both losses per token where it would have computed the LM loss.
    Validation, and what is logged as loss, remain the LM loss as in any other run; the KL is logged separately.
    Losses of hidden states are added if they have a weight (``HiddenStates``).
    """

    def __init__(
        self,
        teacher: str,
        temperature: float = 1.0,
        top_k: int | None = None,
        rest: str = "renormalise",
        cached: bool = False,
        lm_weight: float = 0.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
        embedding_weight: float = 0.0,
        layer_pairs: list[list[int]] | None = None,
        hidden_loss: str = "cosine",
        dynamic_weight: bool = False,
        betas: list[float] | None = None,
        seed: int = 0,
    ) -> None:
        """Store the options.

        Args:
            teacher: Checkpoint of the teacher, of any format.
            temperature: T of ``vocabulary_parallel_kl``.
            top_k: How many of the teacher's tokens count; None for all (``vocabulary_parallel_kl``).
            rest: ``renormalise`` or ``class``, for the tokens that ``top_k`` leaves out (``top_k_kl``).
            cached: Whether the micro-batches come with the teacher's answers, so that it is not needed.
            lm_weight: Weight of the LM loss; 0 for distillation alone.
            kl_weight: Weight of the divergence.
            hidden_weight: Weight of the summed losses of ``layer_pairs`` (``HiddenStates``).
            embedding_weight: Weight of the loss of the embeddings' outputs.
            layer_pairs: ``[student, teacher]`` layers whose outputs are compared, counted from 1.
            hidden_loss: ``cosine`` or ``mse``, as in ``losses.hidden_loss``.
            dynamic_weight: Scale the losses of hidden states to the size of the divergence.
            betas: Betas of the Adam that trains the projection to the teacher's width.
            seed: Seed for the initial projection.
        """
        self.teacher = teacher
        self.temperature = temperature
        self.top_k = top_k
        self.rest = rest
        self.cached = cached
        self.lm_weight = lm_weight
        self.kl_weight = kl_weight
        self.hidden_weight = hidden_weight
        self.embedding_weight = embedding_weight
        self.layer_pairs = layer_pairs or []
        self.hidden_loss = hidden_loss
        self.dynamic_weight = dynamic_weight
        self.betas = betas or [0.9, 0.95]
        self.seed = seed
        self._training = False
        self._restored: dict = {}
        self._states: HiddenStates | None = None
        self._model: Teacher | None = None
        self._batches: deque[Any] = deque()

    def on_train_start(self, trainer, pl_module):
        """Load the teacher, unless its answers are read from a cache, and replace the student's loss."""
        places = [EMBEDDING] if self.embedding_weight > 0 else []
        if self.hidden_weight:
            places += [theirs for _, theirs in self.layer_pairs]
        if not self.cached:
            self._model = Teacher(
                open_source(self.teacher),
                dtype=pl_module.config.params_dtype,
                device=torch.device(torch.cuda.current_device()),
                sequence_parallel=pl_module.config.sequence_parallel,
                places=places,
            )
        self._reduction = _WeightedLosses(self.lm_weight, self.kl_weight)
        students = []
        for chunk in trainer.strategy.megatron_parallel:
            chunk._training_loss_reduction = self._reduction
            student = next(module for module in chunk.modules() if isinstance(module, GPTModel))
            students.append(student)
            if student.post_process:
                student.compute_language_model_loss = self._losses(student.compute_language_model_loss)
        if self.hidden_weight or self.embedding_weight:
            self._states = HiddenStates(
                self._model,
                students,
                pairs=[(ours, theirs) for ours, theirs in self.layer_pairs],
                hidden_weight=self.hidden_weight,
                embedding_weight=self.embedding_weight,
                kind=self.hidden_loss,
                dynamic=self.dynamic_weight,
                betas=tuple(self.betas),
                seed=self.seed,
            )
            if self._restored:
                self._states.load_state_dict(self._restored)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Remember the learning rate of the step."""
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Update the projection before the step's checkpoint is written; Lightning runs checkpoint callbacks last."""
        if self._states:
            self._states.learn(self._rate)

    def state_dict(self):
        """Return the state of ``HiddenStates``, which is the same on every rank."""
        return self._states.state_dict() if self._states else {}

    def load_state_dict(self, state_dict):
        """Keep the state from a checkpoint until training starts."""
        self._restored = state_dict

    def on_megatron_microbatches_start(self, step):
        """Give the micro-batches of a training step to the teacher; the student reads the same ones."""
        self._training = not step.forward_only
        if self._training:
            batches = list(islice(step.data, step.num_microbatches))
            if self._model:
                self._model.read(
                    batches,
                    step.trainer.lightning_module.data_step,
                    sequence_length=step.seq_length,
                    micro_batch_size=step.micro_batch_size,
                )
            else:
                self._batches = deque(batches)
            if self._states:
                self._states.begin([_loss_mask(batch) for batch in batches])
            step.data = iter(batches)

    def on_megatron_step_end(self, step):
        """Log the divergence, which only the last pipeline stage has, and the losses of hidden states."""
        if self._training:
            kl = self._reduction.kl.clone()
            _sync_from_last_pipeline_stage(kl, broadcast=self.dynamic_weight)  # to all ranks, else to rank 0 alone
            step.trainer.lightning_module.log(KL, kl, batch_size=1)
            if self._states:
                losses = self._states.end(self.kl_weight * float(kl))
                for name, loss in zip((HIDDEN, EMBEDDINGS), losses, strict=True):
                    step.trainer.lightning_module.log(name, loss, batch_size=1)
        self._training = False

    def _losses(self, lm_loss):
        """Return the replacement of a model's ``lm_loss``.

        From labels [b, s] and logits [s, b, V / TP] it returns LM loss and KL [2, b, s] in training, otherwise the LM
        loss [b, s].
        """
        group = parallel_state.get_tensor_model_parallel_group()

        def losses(labels, logits):
            if not self._training:
                return lm_loss(labels, logits)
            kl = self._divergence(logits, group if group.size() > 1 else None)
            with torch.set_grad_enabled(self.lm_weight > 0):
                lm = lm_loss(labels, logits)  # last, because it overwrites the logits
            return torch.stack([lm, kl.transpose(0, 1)])

        return losses

    def _divergence(self, logits, group):
        """Return the divergence [s, b] of the next micro-batch, given the student's logits [s, b, V / TP]."""
        if self._model and self.rest == "renormalise":
            teacher = self._model.logits()
            return vocabulary_parallel_kl(logits, teacher, temperature=self.temperature, top_k=self.top_k, group=group)
        if self._model:
            ids, logprobs, rest = top_k_answers(self._model.logits(), self.top_k, vocab=self._model.vocab, group=group)
        else:
            ids, logprobs, rest = answers_in(_items(self._batches.popleft()), logits.device)
        return top_k_kl(
            logits, ids, logprobs, rest if self.rest == "class" else None, temperature=self.temperature, group=group
        )


def _items(batch):
    """Return the items of a micro-batch by name."""
    return batch[0] if isinstance(batch, tuple) else batch


def _loss_mask(batch):
    """Return the loss mask [b, s] of a micro-batch; NeMo's data step gives it to the last pipeline stage only."""
    return _items(batch)["loss_mask"]


class _WeightedLosses(MaskedTokenLossReduction):
    """Combines the two losses of each token [2, b, s] to one; reports the LM loss and stores the divergence."""

    def __init__(self, lm_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.weights = lm_weight, kl_weight
        self.kl = torch.zeros((), device=torch.cuda.current_device())
        """Mean divergence of the last step, on the last pipeline stage."""

    def forward(self, batch, forward_out):
        mask = batch["loss_mask"].float()
        lm, kl = (forward_out.float() * mask).sum((1, 2))
        report = torch.stack([lm.detach(), kl.detach(), mask.sum()])
        # At weight 0 the LM loss has no gradient and may be infinite: 0 * inf would make the total NaN.
        loss = self.weights[1] * kl + (self.weights[0] * lm if self.weights[0] else 0)
        return loss, mask.sum().int(), {"sums": report}

    def reduce(self, losses_reduced_per_micro_batch):
        if not losses_reduced_per_micro_batch:
            return torch.zeros((), device=torch.cuda.current_device())
        sums = torch.stack([part["sums"] for part in losses_reduced_per_micro_batch]).sum(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        lm, self.kl = sums[:2] / sums[2]
        return lm
