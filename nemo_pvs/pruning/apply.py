"""Carry out a plan: a pruned model is a WeightSource that slices its parent's tensors as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.layout import Layout, Part
from nemo_pvs.pruning.plan import Plan


class PrunedSource:
    """What is left of a model after a plan; writers stream it like any other source, a tensor in memory at a time."""

    def __init__(self, source: WeightSource, plan: Plan) -> None:
        """Prepare the slices; no matrix is read but those that tell the model apart from another.

        Raises:
            UserError: the plan was made for another model, or the family's weight table does not add up.
        """
        shape = shape_of(source)
        if shape != plan.parent:
            raise UserError(f"The plan was made for [{plan.parent}], but this model is [{shape}]; plan again for it.")
        made_for = plan.provenance.get("model_fingerprint")
        if made_for is not None and made_for != fingerprint(source):
            raise UserError("The plan was made for a model of this size with other weights; plan again for this one.")
        layout = Layout.for_config(source.config)
        kept = plan.kept_parameters(layout)
        if kept != plan.target.parameters:
            raise UserError(
                f"By conversions/{layout.family}.yaml the plan keeps {kept:,} parameters, but its target "
                f"[{plan.target}] has {plan.target.parameters:,}; mend the table."
            )
        self._source = source
        self._plan = plan
        self.config: Mapping[str, Any] = layout.config(plan.target, source.config)
        self._origins = _origins(layout, plan)

    @property
    def assets(self) -> tuple[Path, ...]:
        """The parent's tokenizer and other files: the vocabulary does not change."""
        return self._source.assets

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the pruned model, in the parent's dtype."""
        origin, layer = self._origins[name]
        tensor = self._source.read(origin.name)
        for dimension, axis in enumerate(origin.axes):
            keep = self._plan.kept(axis, layer)
            if len(keep) < tensor.shape[dimension]:
                tensor = tensor.index_select(dimension, torch.tensor(keep, device=tensor.device))
        return tensor


def _origins(layout: Layout, plan: Plan) -> dict[str, tuple[Part, int | None]]:
    """Return for each tensor of the pruned model the parent's tensor, and the layer in the pruned model."""
    parents = {(entry.layer, entry.megatron): entry for entry in layout.entries(plan.parent)}
    origins: dict[str, tuple[Part, int | None]] = {}
    for entry in layout.entries(plan.target):
        parent = parents[None if entry.layer is None else plan.keep_layers[entry.layer], entry.megatron]
        for part, origin in zip(entry.parts, parent.parts, strict=True):
            origins[part.name] = (origin, entry.layer)
    return origins
