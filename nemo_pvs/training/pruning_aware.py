"""Pruning while training on Megatron's ranks (EfficientLLM, 2502.06663): saliency, compensation and masks in a step.

All of it happens where gradients have been reduced and before the optimizer steps: there the fp32 weights and
gradients lie open, each on the rank that updates it, and what is changed reaches the model as any update does. A
removed unit has no weights, no gradients and no moments, and the norms count the channels that are left; so the model
computes what a smaller one would, in tensors that never change their shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import distributed

from nemo_pvs.errors import UserError
from nemo_pvs.layout import Entry, Layout
from nemo_pvs.pruning.compensation import predictors
from nemo_pvs.pruning.kept_units import KeptUnits
from nemo_pvs.pruning.saliency import Removal, add_terms, next_removal, saliency
from nemo_pvs.pruning.unit_space import UnitSpace
from nemo_pvs.recipe_blocks import Training
from nemo_pvs.recipe_efficient import PruningAware
from nemo_pvs.training.input_samples import COLUMN_PARALLEL, ROW_PARALLEL, InputSamples, Site
from nemo_pvs.training.masked_optimizer import owned, refuse_unfit, unchained

# Norms on their own have the names that Transformer Engine gives them inside of the linear layer behind.
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass
class _Tensor:
    """A weight of this rank's model, with the units of its rows and columns."""

    entry: Entry
    rows: torch.Tensor
    columns: torch.Tensor
    counts: bool
    """Whether no other rank has the same weights."""
    masks: tuple[torch.Tensor, torch.Tensor] | None = None
    """Which rows and columns are kept; None as long as all are."""


@dataclass
class _Shard:
    """The range of a flattened tensor that this rank updates."""

    tensor: _Tensor
    main: torch.nn.Parameter
    optimizer: MegatronOptimizer
    rectangles: list[tuple[slice, slice, slice]] = field(default_factory=list)

    def views(self, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice, slice]]:
        """Yield the rectangles of a tensor that has the shard's size, with their rows and columns."""
        flat = values.detach().view(-1)
        for rows, columns, place in self.rectangles:
            yield flat[place].view(rows.stop - rows.start, columns.stop - columns.start), rows, columns

    @property
    def moments(self) -> list[torch.Tensor]:
        """What the optimizer remembers of each weight."""
        states = self.optimizer.optimizer.state.get(self.main, {}).values()
        return [state for state in states if isinstance(state, torch.Tensor) and state.numel() == self.main.numel()]


def rectangles(start: int, count: int, width: int) -> list[tuple[slice, slice, slice]]:
    """Return the at most three rectangles of a range of a flattened matrix: rows, columns, and where in the range."""
    end = start + count
    first, last = -(-start // width), end // width
    if first > last:
        return [(slice(last, last + 1), slice(start % width, end % width), slice(0, count))]
    pieces = [
        (slice(first - 1, first), slice(start % width, width), slice(0, first * width - start)),
        (slice(first, last), slice(0, width), slice(first * width - start, last * width - start)),
        (slice(last, last + 1), slice(0, end % width), slice(last * width - start, count)),
    ]
    return [piece for piece in pieces if piece[2].stop > piece[2].start]


class Pruner:
    """Removes units of a model while it trains; every rank has one, and they decide alike."""

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
        """Hook into the optimizers from now on.

        Args:
            optimizers: Megatron's, as NeMo calls them.
            chunks: The pieces of the model that this rank has.
            layout: The model's table of weights.
            space: The model's units.
            how: What to remove when.
            train: The training during which it happens.
            state: Nothing removed yet, or what an interrupted run had come to.

        Raises:
            UserError: an optimizer hides its weights, or a weight is not in the table.
        """
        self.space, self.how, self.train, self.state = space, how, train, state
        self.step = 0
        """The step, from 0, whose gradients come next."""
        self._terms = train.tokens_per_step if how.curvature == "tokens" else train.global_batch_size
        self._device = torch.device(torch.cuda.current_device())
        models = [module for chunk in chunks for module in chunk.modules() if isinstance(module, GPTModel)]
        tensors = dict(_tensors(models, layout, space, self._device))
        self._shards = list(_shards(optimizers, tensors))
        # Replicas that share the weights out, or None where each has them all.
        sharded = any(isinstance(optimizer, DistributedOptimizer) for optimizer in unchained(optimizers))
        self._owners = parallel_state.get_data_parallel_group(with_context_parallel=True) if sharded else None
        modules = _modules(models, space)
        stride = max(1, train.tokens_per_step // how.compensation_tokens)
        sequence_parallel = models[0].config.sequence_parallel
        self._inputs = InputSamples(modules, stride, sequence_parallel=sequence_parallel)
        names = {(tensor.entry.layer, tensor.entry.megatron): tensor for tensor in tensors.values()}
        self._sites: dict[Site, _Tensor] = {site: names[site[0], f"{site[1]}.weight"] for site in modules}
        self._refresh()
        for optimizer in optimizers:
            self._install(optimizer)

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
        """Parameters of the model that is left."""
        return self.space.kept_shape(self.state.kept).parameters

    def begin(self, step: int) -> None:
        """Prepare for a step, from 0, before its forward passes."""
        self.step = step
        self._inputs.clear()
        self._inputs.active = self.how.compensate and self._is_due()

    def _is_due(self) -> bool:
        return self.how.is_due(self.step, self.train) and self.parameters > self.how.parameters

    @torch.no_grad()
    def _after_reduction(self) -> None:
        self._sum_up()
        if self._is_due():
            self._remove()
        self._inputs.clear()
        self._inputs.active = False
        for shard in self._shards:
            if shard.tensor.masks and shard.main.grad is not None:
                _zero(shard, shard.main.grad)

    def _sum_up(self) -> None:
        """Take this step's weights and gradients into the averages, the same on every rank then."""
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
        """Let the weights that read other channels make up for those that read what goes."""
        names = {"groups": ROW_PARALLEL[:1], "ffn": ROW_PARALLEL[1:], "hidden": COLUMN_PARALLEL}[removal.kind]
        gone = torch.zeros_like(self.state.kept)
        gone[removal.units] = True
        for site, tensor in self._sites.items():
            part = tensor.entry.parts[0]
            units = self.space.along(part.axes[1], part.layer)
            if site[1] not in names or not bool(gone[units].any()):
                continue
            places = gone[units].nonzero().flatten().to(self._device)
            kept = self.state.kept[units].to(self._device)
            self._take_over(site, tensor, places, kept)

    def _take_over(self, site: Site, tensor: _Tensor, gone: torch.Tensor, kept: torch.Tensor) -> None:
        """Add to a matrix what its columns ``gone`` [k] gave, as far as the ``kept`` [inputs] ones predict it."""
        shares = predictors(self._inputs.hessian(site), gone, kept, self.how.damping)
        rows = site[1] in ROW_PARALLEL
        first = 0
        if rows:
            first = len(tensor.columns) * parallel_state.get_tensor_model_parallel_rank()
        shards = [shard for shard in self._shards if shard.tensor is tensor]
        lost = torch.zeros(len(tensor.rows), len(gone), dtype=torch.float64, device=self._device)
        for shard in shards:
            for weight, own, columns in shard.views(shard.main):
                for place, column in enumerate((gone - first).tolist()):
                    if columns.start <= column < columns.stop:
                        lost[own, place] = weight[:, column - columns.start].double()
        if self._owners is not None:
            distributed.all_reduce(lost, group=self._owners)
        if rows:
            distributed.all_reduce(lost, group=parallel_state.get_tensor_model_parallel_group())
        own_shares = shares[first : first + len(tensor.columns)]
        for shard in shards:
            for weight, own, columns in shard.views(shard.main):
                weight += (lost[own] @ own_shares[columns].T).to(weight.dtype)

    def _refresh(self) -> None:
        """Set weights and moments of removed units to zero, and let the norms know which channels are left."""
        kept = self.state.kept.to(self._device)
        for shard in self._shards:
            tensor = shard.tensor
            masks = kept[tensor.rows], kept[tensor.columns]
            before = tensor.masks
            tensor.masks = None if masks[0].all() and masks[1].all() else masks
            same = before and all(map(torch.equal, before, masks))
            if tensor.masks and not same:
                for values in (shard.main, *shard.moments):
                    _zero(shard, values)
        self.hidden = self.space.hidden(kept)
        """Which hidden channels are left, bool [d]."""


def _zero(shard: _Shard, values: torch.Tensor) -> None:
    """Set what a shard has of removed units to zero."""
    assert shard.tensor.masks
    kept_rows, kept_columns = shard.tensor.masks
    for part, rows, columns in shard.views(values):
        part.masked_fill_(~kept_rows[rows, None], 0).masked_fill_(~kept_columns[columns], 0)


def _tensors(
    models: list[GPTModel], layout: Layout, space: UnitSpace, device: torch.device
) -> Iterator[tuple[torch.nn.Parameter, _Tensor]]:
    """Yield every parameter of this rank with the units of its rows and columns."""
    entries = {(entry.layer, entry.megatron): entry for entry in layout.entries(space.shape)}
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for model in models:
        numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
        for name, parameter in model.named_parameters():
            prefix = next((prefix for prefix in numbers if name.startswith(prefix)), "")
            own = name.removeprefix(prefix)
            for norm, stored in _NORMS.items():
                own = own.replace(norm, stored) if own.startswith(norm) else own
            if own == "output_layer.weight" and space.shape.tied:  # the last stage's copy of the embedding
                own = "embedding.word_embeddings.weight"
            entry = entries.get((numbers.get(prefix), own))
            if entry is None:
                raise UserError(f"The weight {name} is in no table of conversions/, so it cannot be pruned.")
            rows, columns = space.of_tensor(entry, rank=rank, ranks=ranks)
            if (len(rows), len(columns)) != (len(parameter), parameter[0].numel()):
                raise UserError(
                    f"{name} is {tuple(parameter.shape)}, not {(len(rows), len(columns))} as its units are; the "
                    "vocabulary may be padded, which pruning while training does not know."
                )
            copied = getattr(parameter, "shared", False) or (entry.tensor_parallel_axis is None and rank > 0)
            yield parameter, _Tensor(entry, rows.to(device), columns.to(device), not copied)


def _shards(optimizers: Sequence[MegatronOptimizer], tensors: dict[torch.nn.Parameter, _Tensor]) -> Iterator[_Shard]:
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    for optimizer in unchained(optimizers):
        refuse_unfit(optimizer, dict.fromkeys(tensors))
        whole = not isinstance(optimizer, DistributedOptimizer)
        for parameter, main, start in owned(optimizer):
            tensor = tensors[parameter]
            if whole and replica > 0:
                tensor.counts = False
            yield _Shard(tensor, main, optimizer, rectangles(start, main.numel(), len(tensor.columns)))


def _modules(models: list[GPTModel], space: UnitSpace) -> dict[Site, torch.nn.Module]:
    """Return the linear layers of this rank, in the order of the layers.

    A tied output head is left out: what would make up for a channel in it would change the embedding.
    """
    found: dict[Site, torch.nn.Module] = {}
    for model in models:
        for layer in model.decoder.layers:
            for name in (*COLUMN_PARALLEL[:2], *ROW_PARALLEL):
                found[layer.layer_number - 1, name] = layer.get_submodule(name)
        if model.post_process and not space.shape.tied:
            found[None, "output_layer"] = model.output_layer
    return found
