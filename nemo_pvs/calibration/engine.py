"""The calibration pass: every statistic that structured pruning needs, from one layer-by-layer dense forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import nn

from nemo_pvs.calibration.gradients import taylor_scores
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.statistics import ChannelStatistic, CosineDistance, Energy, MeanAbsL2, Moments
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.model import ON_CPU, Compute, LayerwiseModel
from nemo_pvs.model.shape import Shape
from nemo_pvs.system import ranks

AGGREGATIONS: dict[str, type[ChannelStatistic]] = {"energy": Energy, "meanabs_l2": MeanAbsL2}


def calibrate(
    source: WeightSource,
    tokens: TokenSet,
    *,
    gradients: bool = False,
    compute: Compute = ON_CPU,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Measure a model's hidden channels, FFN channels, query heads and layers on some text.

    The sites are those of Minitron (2407.14679): hidden channels at the outputs of both norms of a layer (after the
    weight), summed over layers, without the final norm; FFN channels at the input of ``down_proj``; heads at the input
    of ``o_proj``, combining a head's channels. Layers are measured by block influence (ShortGPT, 2403.03853). For FLAP
    (2312.11983) and similar methods the scores include mean and variance of the inputs of ``down_proj`` and
    ``o_proj``, and squares and absolute values of the columns of these weights, so that no plan needs the model.

    If ``torch.distributed`` is initialised, every rank reads its share of the sequences and returns all scores, equal
    to those of one rank up to the order of summation, but without FLAP's order-dependent ``fluctuation``.

    Args:
        source: The dense model.
        tokens: The calibration text.
        gradients: Also run a backward pass, for the Taylor importance of units (``gradients.taylor_scores``).
        compute: Where and how layers run.
        progress: Called with (layers done, their total).

    Raises:
        UserError: the tokens do not fit the model, its layers are uneven, its activations or gradients are not
            finite, or the memory limit is too low for gradients.
    """
    model = LayerwiseModel(source, compute)
    if model.shape.uneven:
        raise UserError("The layers of this model are uneven already; calibrate the model that it was pruned from.")
    layers = [_LayerStatistics(model.shape) for _ in range(model.shape.layers)]
    chunks = list(model.chunks(ranks.split(tokens.ids)))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, (len(chunks) + gradients) * len(layers))

    for ids in chunks:
        hidden = model.embed(ids)
        for index, statistics in enumerate(layers):
            layer = model.layer(index)
            statistics.attach(layer)
            model.run_layer(layer, hidden, compute.batch_size)
            if not statistics.finite:
                raise UserError(f"The activations of layer {index} are not finite; is the checkpoint damaged?")
            step()
        del hidden  # before the next states take its memory
    for statistics in layers:
        statistics.all_reduce()
    tensors = _collect(layers, model.shape)
    if gradients:
        tensors |= taylor_scores(model, tokens, batch_size=compute.batch_size, progress=step)
    manifest = {
        "model_fingerprint": fingerprint(source),
        "shape": model.shape.to_dict(),
        "tokens": tokens.manifest,
        "dtype": str(compute.dtype),
        "versions": {
            "nemo_pvs": version("nemo_pvs"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return Scores({**tensors, "tokens": tokens.ids.contiguous()}, manifest)


class _LayerStatistics:
    """The statistics of one layer, updated by hooks on its modules."""

    def __init__(self, shape: Shape) -> None:
        self.input_norm = _aggregations(shape.hidden)
        self.post_attention_norm = _aggregations(shape.hidden)
        self.ffn = _LinearInput(shape.axis("ffn"))
        self.attention = _LinearInput(shape.axis("query"))
        self.block_influence = CosineDistance()

    def attach(self, layer: Any) -> None:
        """Register hooks on a decoder layer; they last as long as the layer."""
        _watch_output(layer.input_layernorm, self.input_norm)
        _watch_output(layer.post_attention_layernorm, self.post_attention_norm)
        self.ffn.attach(layer.mlp.down_proj)
        self.attention.attach(layer.self_attn.o_proj)
        layer.register_forward_hook(lambda _, inputs, output: self.block_influence.update(inputs[0], output))

    @property
    def finite(self) -> bool:
        """Whether all activations were finite; an infinity or NaN persists in the sums over them."""
        sums = [statistic.result() for site in self._sites() for statistic in site.values()]
        return all(bool(total.isfinite().all()) for total in (*sums, torch.tensor(self.block_influence.result())))

    def all_reduce(self) -> None:
        """Combine the statistics of all ranks, on every rank."""
        for site in self._sites():
            for statistic in site.values():
                statistic.all_reduce()
        for linear in (self.ffn, self.attention):
            linear.moments.all_reduce()
        self.block_influence.all_reduce()

    def _sites(self) -> Iterator[_Site]:
        yield from (self.input_norm, self.post_attention_norm, self.ffn.site, self.attention.site)


class _LinearInput:
    """Statistics of a linear module's input, and of the columns of its weight [outputs, inputs]."""

    def __init__(self, channels: int) -> None:
        self.site = _aggregations(channels)
        self.moments = Moments(channels)
        self.weight_energy = torch.empty(0)
        self.weight_mean_abs = torch.empty(0)

    def attach(self, linear: Any) -> None:
        weight = linear.weight.detach().float()
        self.weight_energy = weight.square().sum(dim=0).double().cpu()
        self.weight_mean_abs = weight.abs().mean(dim=0).double().cpu()
        linear.register_forward_pre_hook(lambda _, inputs: self._update(inputs[0]))

    def _update(self, activations: torch.Tensor) -> None:
        _update(self.site, activations)
        self.moments.update(activations)

    def channels(self) -> dict[str, torch.Tensor]:
        """Return the statistics by name, each float64 [channels]."""
        tensors = {
            "energy": self.site["energy"].result(),
            "mean": self.moments.mean(),
            "variance": self.moments.variance(),
            "weight_energy": self.weight_energy,
            "weight_mean_abs": self.weight_mean_abs,
        }
        fluctuation = self.moments.fluctuation()
        return tensors if fluctuation is None else {**tensors, "fluctuation": fluctuation}


_Site = dict[str, ChannelStatistic]


def _aggregations(channels: int) -> _Site:
    return {name: aggregation(channels) for name, aggregation in AGGREGATIONS.items()}


def _watch_output(module: nn.Module, site: _Site) -> None:
    module.register_forward_hook(lambda _, __, output: _update(site, output))


def _update(site: _Site, activations: torch.Tensor) -> None:
    for statistic in site.values():
        statistic.update(activations)


def _collect(layers: list[_LayerStatistics], shape: Shape) -> dict[str, torch.Tensor]:
    tensors = {"block_influence": torch.tensor([layer.block_influence.result() for layer in layers]).double()}
    for name in AGGREGATIONS:
        norms = [site[name].result() for layer in layers for site in (layer.input_norm, layer.post_attention_norm)]
        tensors[f"hidden.{name}"] = torch.stack(norms).sum(dim=0)
        tensors[f"ffn.{name}"] = torch.stack([layer.ffn.site[name].result() for layer in layers])
        channels = torch.stack([layer.attention.site[name].result() for layer in layers]).unflatten(
            1, (shape.heads, -1)
        )
        # Energies are sums of squares, which add up; norms of channels combine into the norm of the head.
        tensors[f"heads.{name}"] = channels.sum(dim=2) if name == "energy" else channels.norm(dim=2)
    for site, linears in {
        "attention": [layer.attention for layer in layers],
        "ffn": [layer.ffn for layer in layers],
    }.items():
        rows = [linear.channels() for linear in linears]
        tensors |= {f"{site}.{name}": torch.stack([row[name] for row in rows]) for name in rows[0]}
    return tensors
