"""The tensors of a Megatron rank with the units of their rows and columns, and the ranges that the rank updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from nemo_pvs.errors import UserError
from nemo_pvs.megatron.masks.optimizer import owned, refuse_unfit, unchained
from nemo_pvs.megatron.parameter_entries import parameter_entries
from nemo_pvs.megatron.pruning.input_samples import COLUMN_PARALLEL, ROW_PARALLEL, Site
from nemo_pvs.model.layout import Entry, Layout
from nemo_pvs.pruning.learned.unit_space import UnitSpace


@dataclass
class UnitTensor:
    """A weight of this rank's model, with the units of its rows and columns."""

    entry: Entry
    rows: torch.Tensor
    columns: torch.Tensor
    counts: bool
    """Whether this rank counts these weights; of ranks with the same weights only one does."""
    masks: tuple[torch.Tensor, torch.Tensor] | None = None
    """Which rows and columns are kept; None while all are."""


@dataclass
class UnitShard:
    """The range of a flattened tensor that this rank updates."""

    tensor: UnitTensor
    main: torch.nn.Parameter
    optimizer: MegatronOptimizer
    rectangles: list[tuple[slice, slice, slice]] = field(default_factory=list)

    def views(self, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice, slice]]:
        """Yield the rectangles of a tensor of the shard's size, with their rows and columns."""
        flat = values.detach().view(-1)
        for rows, columns, flat_range in self.rectangles:
            yield flat[flat_range].view(rows.stop - rows.start, columns.stop - columns.start), rows, columns

    def zero_removed(self, values: torch.Tensor) -> None:
        """Set the entries of removed units in a tensor of the shard's size to zero; ``masks`` must not be None."""
        assert self.tensor.masks
        kept_rows, kept_columns = self.tensor.masks
        for part, rows, columns in self.views(values):
            part.masked_fill_(~kept_rows[rows, None], 0).masked_fill_(~kept_columns[columns], 0)

    @property
    def moments(self) -> list[torch.Tensor]:
        """The optimizer's moments of the shard's weights."""
        states = self.optimizer.optimizer.state.get(self.main, {}).values()
        return [state for state in states if isinstance(state, torch.Tensor) and state.numel() == self.main.numel()]


def rectangles(start: int, count: int, width: int) -> list[tuple[slice, slice, slice]]:
    """Split a range of a flattened matrix into at most three rectangles.

    Args:
        start: First element of the range.
        count: Number of elements.
        width: Columns of the matrix.

    Returns:
        For each rectangle its rows, its columns, and its part of the range.
    """
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


def unit_tensors(
    models: list[GPTModel], layout: Layout, space: UnitSpace, device: torch.device
) -> Iterator[tuple[torch.nn.Parameter, UnitTensor]]:
    """Yield every parameter of this rank with the units of its rows and columns.

    Raises:
        UserError: a weight is not in the table, or its vocabulary is padded.
    """
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter, entry in parameter_entries(models, layout, space.shape):
        rows, columns = space.of_tensor(entry, rank=rank, ranks=ranks)
        if (len(rows), len(columns)) != (len(parameter), parameter[0].numel()):
            raise UserError(
                f"{name} has the shape {tuple(parameter.shape)}, but its units need {(len(rows), len(columns))}; if "
                "the vocabulary is padded, choose a tensor parallel size that divides it, as pruning while training "
                "does not support padding."
            )
        copied = getattr(parameter, "shared", False) or (entry.tensor_parallel_axis is None and rank > 0)
        yield parameter, UnitTensor(entry, rows.to(device), columns.to(device), not copied)


def unit_shards(
    optimizers: Sequence[MegatronOptimizer], tensors: dict[torch.nn.Parameter, UnitTensor]
) -> Iterator[UnitShard]:
    """Yield the range of each tensor that this rank updates.

    Raises:
        UserError: an optimizer hides its weights.
    """
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    for optimizer in unchained(optimizers):
        refuse_unfit(optimizer, dict.fromkeys(tensors))
        whole = not isinstance(optimizer, DistributedOptimizer)
        for parameter, main, start in owned(optimizer):
            tensor = tensors[parameter]
            if whole and replica > 0:
                tensor.counts = False
            yield UnitShard(tensor, main, optimizer, rectangles(start, main.numel(), len(tensor.columns)))


def linear_layers(models: list[GPTModel], space: UnitSpace) -> dict[Site, torch.nn.Module]:
    """Return the linear layers of this rank, in the order of the layers.

    A tied output head is left out: compensating for a channel in it would change the embedding.
    """
    linear: dict[Site, torch.nn.Module] = {}
    for model in models:
        for layer in model.decoder.layers:
            for name in (*COLUMN_PARALLEL[:2], *ROW_PARALLEL):
                linear[layer.layer_number - 1, name] = layer.get_submodule(name)
        if model.post_process and not space.shape.tied:
            linear[None, "output_layer"] = model.output_layer
    return linear
