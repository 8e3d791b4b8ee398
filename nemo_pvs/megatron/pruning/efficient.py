"""Pruning while training on Megatron's ranks (EfficientLLM, 2502.06663): saliency, compensation and masks in a step.

All of it happens after the gradients are reduced and before the optimizer steps. At this point the fp32 weights and
gradients are accessible, each on the rank that updates it, and changes reach the model as any update does. The
weights, gradients and moments of a removed unit are zero, and the norms count only the remaining channels; so the
model computes what a smaller one would, in tensors whose shapes never change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import distributed

from nemo_pvs.megatron.masks.optimizer import unchained
from nemo_pvs.megatron.parameter_entries import gpt_models
from nemo_pvs.megatron.pruning.input_samples import COLUMN_PARALLEL, ROW_PARALLEL, InputSamples, Site
from nemo_pvs.megatron.pruning.unit_tensors import UnitTensor, linear_layers, unit_shards, unit_tensors
from nemo_pvs.model.layout import Layout
from nemo_pvs.pruning.learned.compensation import predictors
from nemo_pvs.pruning.learned.kept_units import KeptUnits
from nemo_pvs.pruning.learned.saliency import Removal, add_terms, next_removal, saliency
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.training import Training


class Pruner:
    """Removes units of a model while it trains; every rank has one, and all make the same decisions."""

    def __init__(
        self,
        optimizers: Sequence[MegatronOptimizer],
        chunks: Iterable[torch.nn.Module],
        layout: Layout,
        space: UnitSpace,
        how: PruningAware,
        train: Training,
        state: KeptUnits,
    ) -> None:
        """Hook into the optimizers.

        Args:
            optimizers: Megatron's optimizers as NeMo holds them: one, which may be a chain.
            chunks: The model chunks of this rank.
            layout: The model's weight table.
            space: The model's units.
            how: What to remove, and when.
            train: Training options of the run.
            state: The units kept so far: all of them, or those of an interrupted run.

        Raises:
            UserError: an optimizer hides its weights, or a weight is not in the table.
        """
        self.space, self.how, self.train, self.state = space, how, train, state
        self.step = 0
        """The current step, from 0."""
        self._terms = train.tokens_per_step if how.curvature == "tokens" else train.global_batch_size
        self._device = torch.device(torch.cuda.current_device())
        models = gpt_models(chunks)
        tensors = dict(unit_tensors(models, layout, space, self._device))
        self._shards = list(unit_shards(optimizers, tensors))
        # Replicas among which the weights are sharded, or None if each updates all of them.
        sharded = any(isinstance(optimizer, DistributedOptimizer) for optimizer in unchained(optimizers))
        self._owners = parallel_state.get_data_parallel_group(with_context_parallel=True) if sharded else None
        modules = linear_layers(models, space)
        stride = max(1, train.tokens_per_step // how.compensation_tokens)
        sequence_parallel = models[0].config.sequence_parallel
        self._inputs = InputSamples(modules, stride, sequence_parallel=sequence_parallel)
        names = {(tensor.entry.layer, tensor.entry.megatron): tensor for tensor in tensors.values()}
        self._sites: dict[Site, UnitTensor] = {site: names[site[0], f"{site[1]}.weight"] for site in modules}
        self._refresh()
        self._install(*optimizers)

    def _install(self, optimizer: MegatronOptimizer) -> None:
        prepare = optimizer.prepare_grads

        def prepare_and_prune() -> bool:
            overflow = prepare()
            if not overflow:
                self._after_reduction()
            return overflow

        optimizer.prepare_grads = prepare_and_prune

    @property
    def parameters(self) -> int:
        """Number of parameters of the remaining model."""
        return self.space.kept_shape(self.state.kept).parameters

    def begin(self, step: int) -> None:
        """Start a step, counted from 0, before its forward passes."""
        self.step = step
        self._inputs.clear()
        self._inputs.active = self.how.compensate and self._is_due()

    def _is_due(self) -> bool:
        return self.how.is_due(self.step, self.train) and self.parameters > self.how.parameters

    @torch.no_grad()
    def _after_reduction(self) -> None:
        self._accumulate()
        if self._is_due():
            self._remove()
        self._inputs.clear()
        self._inputs.active = False
        for shard in self._shards:
            if shard.tensor.masks and shard.main.grad is not None:
                shard.zero_removed(shard.main.grad)

    def _accumulate(self) -> None:
        """Add this step's weights and gradients to the moving averages, which are then the same on every rank."""
        terms = torch.zeros(2, self.space.size, dtype=torch.float64, device=self._device)
        for shard in self._shards:
            if shard.tensor.counts and shard.main.grad is not None:
                gradients = shard.views(shard.main.grad)
                for (weight, rows, columns), (gradient, *_) in zip(shard.views(shard.main), gradients, strict=True):
                    add_terms(terms, weight * gradient, shard.tensor.rows[rows], shard.tensor.columns[columns])
        distributed.all_reduce(terms)
        self.state.totals.mul_(self.how.decay).add_(terms.cpu(), alpha=1 - self.how.decay)

    def _remove(self) -> None:
        goal = int(self.how.parameters)
        if self.how.pace == "linear":
            goal = self.how.goal(self.step, self.train, self.space.shape.parameters)
        first, second = self.state.totals
        scores = saliency(first, self._terms * second, signed=self.how.signed)
        parameters = self.parameters
        while parameters > goal:
            removal = next_removal(scores, self.state.kept, self.space, self.how.rules)
            self.state.kept[removal.units] = False
            if self.how.compensate:
                self._compensate(removal)
            self._refresh()
            parameters -= removal.parameters
            self.state.removals.append(
                {
                    "step": self.step,
                    "kind": removal.kind,
                    "units": len(removal.units),
                    "parameters": parameters,
                    "saliency": removal.saliency,
                }
            )
            if self.how.pace == "one":
                return

    def _compensate(self, removal: Removal) -> None:
        """Adjust the weights that read kept channels to compensate for those that read removed ones."""
        names = {"groups": ROW_PARALLEL[:1], "ffn": ROW_PARALLEL[1:], "hidden": COLUMN_PARALLEL}[removal.kind]
        removed = torch.zeros_like(self.state.kept)
        removed[removal.units] = True
        for site, tensor in self._sites.items():
            part = tensor.entry.parts[0]
            units = self.space.along(part.axes[1], part.layer)
            if site[1] not in names or not bool(removed[units].any()):
                continue
            columns = removed[units].nonzero().flatten().to(self._device)
            kept = self.state.kept[units].to(self._device)
            self._compensate_matrix(site, tensor, columns, kept)

    def _compensate_matrix(self, site: Site, tensor: UnitTensor, removed: torch.Tensor, kept: torch.Tensor) -> None:
        """Add the output of a matrix's ``removed`` columns [k] to its ``kept`` ones, as far as these predict it.

        Args:
            site: The linear layer.
            tensor: Its weight on this rank.
            removed: Indices of the removed columns [k], over all tensor ranks.
            kept: Which columns are kept, bool [inputs].
        """
        shares = predictors(self._inputs.hessian(site), removed, kept, self.how.damping)
        rows = site[1] in ROW_PARALLEL
        first = 0
        if rows:
            first = len(tensor.columns) * parallel_state.get_tensor_model_parallel_rank()
        shards = [shard for shard in self._shards if shard.tensor is tensor]
        lost = torch.zeros(len(tensor.rows), len(removed), dtype=torch.float64, device=self._device)
        for shard in shards:
            for weight, local_rows, columns in shard.views(shard.main):
                for index, column in enumerate((removed - first).tolist()):
                    if columns.start <= column < columns.stop:
                        lost[local_rows, index] = weight[:, column - columns.start].double()
        if self._owners is not None:
            distributed.all_reduce(lost, group=self._owners)
        if rows:
            distributed.all_reduce(lost, group=parallel_state.get_tensor_model_parallel_group())
        local_shares = shares[first : first + len(tensor.columns)]
        for shard in shards:
            for weight, local_rows, columns in shard.views(shard.main):
                weight += (lost[local_rows] @ local_shares[columns].T).to(weight.dtype)

    def _refresh(self) -> None:
        """Set weights and moments of removed units to zero, and update the channels that the norms count."""
        kept = self.state.kept.to(self._device)
        for shard in self._shards:
            tensor = shard.tensor
            masks = kept[tensor.rows], kept[tensor.columns]
            before = tensor.masks
            tensor.masks = None if masks[0].all() and masks[1].all() else masks
            same = before and all(map(torch.equal, before, masks))
            if tensor.masks and not same:
                for values in (shard.main, *shard.moments):
                    shard.zero_removed(values)
        self.hidden = self.space.hidden(kept)
        """Which hidden channels are left, bool [d]."""
