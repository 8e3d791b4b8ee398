"""Prune layer by layer, each layer by its inputs in the model pruned so far.

The engine of SparseGPT (2301.00774) and Wanda (2306.11695): all sequences go through the dense layer, its matrices are
pruned by their inputs there, and the sequences go through the pruned layer again, whose outputs are the inputs of the
next layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute, LayerwiseModel
from nemo_pvs.model.layout import Entry
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.sparse.pruned_layers import PrunedMatrices, SparseSource
from nemo_pvs.pruning.sparse.sparsity import Sparsity, prunable
from nemo_pvs.pruning.sparse.work_folder import WorkFolder
from nemo_pvs.system import ranks
from nemo_pvs.system.files import sha256_bytes

MatrixPruner = Callable[[Sequence[torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]
"""From matrices [outputs, inputs] to the pruned ones, each in its dtype with its mask (bool, true if kept)."""


_LAST_MATRIX = "mlp.down_proj"
"""The last matrix of a layer's forward pass, in every supported family."""


class InputStatistic(Protocol):
    """A sum over tokens of the input of some matrices."""

    def update(self, activations: torch.Tensor) -> None:
        """Add a batch of activations [n, S, channels]."""

    def result(self) -> torch.Tensor:
        """Return the sum [channels], or [channels, channels] with the squares on its diagonal."""


class LayerwiseMethod(Protocol):
    """What the engine needs of a pruning method."""

    @property
    def sparsity(self) -> Sparsity:
        """How many weights to remove."""

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the result depends on, as JSON."""

    def statistic(self, channels: int) -> InputStatistic:
        """Return an empty statistic of an input with ``channels`` channels."""

    def pruner(self, total: torch.Tensor, sequences: int, warn: Callable[[str], None]) -> MatrixPruner:
        """Return the pruner of all matrices that read an input, given its statistic over ``sequences`` sequences."""


def prune_layers(
    source: WeightSource,
    tokens: TokenSet,
    method: LayerwiseMethod,
    folder: Path,
    *,
    calibration: Literal["sequential", "dense"] = "sequential",
    compute: Compute = ON_CPU,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> SparseSource:
    """Prune every matrix of the decoder layers; holds one layer and its statistics in memory, and maps the rest.

    If it is killed, the same call resumes after the last finished layer, with a bit-identical result. With several
    ranks (``torch.distributed``) each reads its share of the sequences, all prune alike, and one writes.

    Args:
        source: The dense model.
        tokens: The calibration text.
        method: ``Wanda`` or ``SparseGPT``.
        folder: Where the pruned layers are written (``work_folder``); the result reads them from there.
        calibration: ``sequential``, or ``dense``: every layer gets its inputs in the dense model, which saves one pass
            per layer and is not what the papers do.
        compute: Where and how layers run.
        overwrite: Start over if ``folder`` belongs to a pruning with other settings.
        progress: Called with (sequences passed through a layer, their total), for this rank.
        warn: Called with one sentence that begins with the layer.

    Raises:
        UserError: the tokens do not fit the model, the pattern does not divide a matrix, activations are not finite
            (names the layer), or ``folder`` belongs to another pruning.
    """
    model = LayerwiseModel(source, compute)
    inputs: dict[int, list[Entry]] = {layer: [] for layer in range(model.shape.layers)}
    for entry in prunable(source, method.sparsity):
        inputs[entry.layer or 0].append(entry)
    ids = ranks.split(tokens.ids)
    settings = {
        **method.settings,
        "calibration": calibration,
        "model": fingerprint(source),
        "tokens": sha256_bytes(tokens.ids.contiguous().numpy().tobytes()),
        "samples": len(tokens.ids),
        "batch_size": compute.batch_size,
        "dtype": str(compute.dtype),
        "device": torch.device(compute.device).type,
        "ranks": ranks.world_size(),
    }
    size = (*ids.shape, model.shape.hidden)
    with WorkFolder(folder, model.shape.layers, settings, overwrite=overwrite) as work:
        passes = _Passes(model, compute.batch_size, len(ids), work.layers_done, calibration, progress)
        if work.layers_done == 0:
            _embed(model, ids, work.states(0, size, compute.dtype, new=True))
        after: torch.Tensor | None = None
        for index in range(work.layers_done, model.shape.layers):
            layer = model.layer(index)
            before = _near(model, work.states(index, size, compute.dtype)) if after is None else after
            file = work.states(index + 1, size, compute.dtype, new=True) if index + 1 < model.shape.layers else None
            after = None if file is None else model.memory.near(file)
            with _watching(layer, inputs[index], method, model.shape, stop=calibration != "dense") as statistics:
                passes.run(layer, before, after if calibration == "dense" else None)
            matrices: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
            for entry, statistic in zip(inputs[index], statistics, strict=True):
                matrices.update(_prune(entry, statistic, method, source, len(tokens.ids), model.device, warn))
            statistics.clear()
            if calibration == "sequential" and after is not None:
                _replace(layer, index, matrices)
                passes.run(layer, before, after)
            if file is not None and after is not None:
                file.copy_(after)  # on the CPU they are the same
            work.finish_layer(index, matrices)
        return SparseSource(source, folder, work.record)


def _embed(model: LayerwiseModel, ids: torch.Tensor, states: torch.Tensor) -> None:
    start = 0
    for text in model.chunks(ids):
        states[start : start + len(text)] = model.embed(text)
        start += len(text)


def _near(model: LayerwiseModel, file: torch.Tensor) -> torch.Tensor:
    """Return the states in a file, near the device; on the CPU they are used where they are."""
    return model.memory.near(file).copy_(file)


class _Passes:
    """Runs sequences through layers and counts them."""

    def __init__(
        self,
        model: LayerwiseModel,
        batch_size: int,
        sequences: int,
        layers_done: int,
        calibration: str,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        passes = 2 if calibration == "sequential" else 1
        self._model = model
        self._batch_size = batch_size
        self._done = sequences * passes * layers_done
        # The outputs of the last layer, once pruned, are not needed.
        self._total = sequences * (passes * model.shape.layers - (passes - 1))
        self._progress = progress

    def run(self, layer: nn.Module, before: torch.Tensor, after: torch.Tensor | None) -> None:
        """Run the layer on the states ``before`` it, and write its outputs to ``after``, if given."""
        rotary = self._model.positions(before)
        places = (before if after is None else after).split(self._batch_size)
        batches = self._model.transfers.batches(before, self._batch_size)
        for states, place in zip(batches, places, strict=True):
            with suppress(_AllSeenError), torch.no_grad():
                outputs = layer(states, position_embeddings=rotary)
                if after is not None:
                    self._model.transfers.store(outputs, place)
            self._done += len(states)
            if self._progress:
                self._progress(self._done, self._total)


@contextmanager
def _watching(
    layer: nn.Module, inputs: list[Entry], method: LayerwiseMethod, shape: Shape, *, stop: bool
) -> Iterator[list[InputStatistic]]:
    """Yield a statistic for each input of the layer's matrices, updated by forward passes within the context.

    With ``stop`` a forward pass ends before the last matrix, because the dense layer's outputs are not needed.
    """
    statistics, hooks = [], []
    for entry in inputs:
        first = entry.parts[0]
        statistic = method.statistic(first.size(shape)[1])
        hook = partial(_update, statistic)
        hooks.append(layer.get_submodule(_module_name(first.name, first.layer)).register_forward_pre_hook(hook))
        statistics.append(statistic)
    if stop:  # hooks run in the order of their registration
        hooks.append(layer.get_submodule(_LAST_MATRIX).register_forward_pre_hook(_all_seen))
    try:
        yield statistics
    finally:
        for handle in hooks:
            handle.remove()


class _AllSeenError(Exception):
    """Every matrix of a layer has received its input."""


def _all_seen(*_: object) -> None:
    raise _AllSeenError


def _update(statistic: InputStatistic, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    statistic.update(inputs[0])


def _prune(
    entry: Entry,
    statistic: InputStatistic,
    method: LayerwiseMethod,
    source: WeightSource,
    sequences: int,
    device: torch.device,
    warn: Callable[[str], None],
) -> PrunedMatrices:
    """Prune all matrices that read one input."""
    total = ranks.all_reduce(statistic.result())
    names = [part.name for part in entry.parts]
    where = f"layer {entry.layer}, input of {', '.join(_module_name(name, entry.layer) for name in names)}"
    if not bool((total.diagonal() if total.ndim == 2 else total).isfinite().all()):
        raise UserError(f"The model's activations are not finite ({where}); is the checkpoint damaged?")
    prune = method.pruner(total, sequences, lambda text: warn(f"{where}: {text}") if ranks.is_main() else None)
    return dict(zip(names, prune([source.read(name).to(device) for name in names]), strict=True))


def _replace(layer: nn.Module, index: int, matrices: PrunedMatrices) -> None:
    """Replace a loaded layer's matrices by the pruned ones, rounded as they will be stored."""
    for name, (weight, _) in matrices.items():
        module = layer.get_submodule(_module_name(name, index))
        module.weight = nn.Parameter(weight.to(next(module.parameters()).dtype), requires_grad=False)


def _module_name(weight: str, layer: int | None) -> str:
    return weight.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")
