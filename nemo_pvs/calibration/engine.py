"""The calibration pass: every statistic that structured pruning needs, from one dense forward, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import nemo_pvs
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.statistics import ChannelStatistic, CosineDistance, Energy, MeanAbsL2
from nemo_pvs.calibration.tokens import TokenSet
from nemo_pvs.checkpoints.source import WeightSource, fingerprint
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise import MEMORY_LIMIT, LayerwiseModel
from nemo_pvs.shape import Shape

AGGREGATIONS: dict[str, type[ChannelStatistic]] = {"energy": Energy, "meanabs_l2": MeanAbsL2}


def calibrate(
    source: WeightSource,
    tokens: TokenSet,
    *,
    batch_size: int = 8,
    device: str = "cpu",
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Measure a model's hidden channels, FFN channels, query heads and layers on some text.

    The sites are those of Minitron (2407.14679): hidden channels at the outputs of both norms of a layer (after the
    weight), summed over layers, the final norm left out; FFN channels at the input of ``down_proj``; heads at the
    input of ``o_proj``, their channels together. Layers are measured by block influence (ShortGPT, 2403.03853).

    Args:
        source: The model, dense.
        tokens: What it reads.
        batch_size: Sequences a batch; changes speed and memory, not the scores.
        device: Where layers run.
        memory_limit: Bytes for hidden states; more text than that is read in several sweeps over the layers.
        progress: Called with (layers done, layers in all).

    Raises:
        UserError: the tokens do not fit the model, or its activations are not finite.
    """
    model = LayerwiseModel(source, device=device, memory_limit=memory_limit)
    layers = [_LayerStatistics(model.shape) for _ in range(model.shape.layers)]
    chunks = list(model.chunks(tokens.ids))
    done = 0
    for ids in chunks:
        hidden = model.embed(ids)
        for index, statistics in enumerate(layers):
            layer = model.layer(index)
            statistics.attach(layer)
            model.run_layer(layer, hidden, batch_size)
            done += 1
            if progress:
                progress(done, len(chunks) * len(layers))
    tensors = _collect(layers, model.shape)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"The model's activations overflow ({name} is not finite); is the checkpoint damaged?")
    manifest = {
        "model_fingerprint": fingerprint(source),
        "shape": model.shape.to_dict(),
        "tokens": tokens.manifest,
        "versions": {
            "nemo_pvs": nemo_pvs.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return Scores({**tensors, "tokens": tokens.ids.contiguous()}, manifest)


class _LayerStatistics:
    """The statistics of one layer, fed by hooks on its modules; each site has both aggregations."""

    def __init__(self, shape: Shape) -> None:
        self.input_norm = _aggregations(shape.hidden)
        self.post_attention_norm = _aggregations(shape.hidden)
        self.ffn = _aggregations(shape.ffn)
        self.heads = _aggregations(shape.heads * shape.head_dim)
        self.block_influence = CosineDistance()

    def attach(self, layer: Any) -> None:
        """Watch a decoder layer for as long as it lives."""
        _watch_output(layer.input_layernorm, self.input_norm)
        _watch_output(layer.post_attention_layernorm, self.post_attention_norm)
        _watch_input(layer.mlp.down_proj, self.ffn)
        _watch_input(layer.self_attn.o_proj, self.heads)
        layer.register_forward_hook(lambda _, inputs, output: self.block_influence.update(inputs[0], output))


_Site = dict[str, ChannelStatistic]


def _aggregations(channels: int) -> _Site:
    return {name: aggregation(channels) for name, aggregation in AGGREGATIONS.items()}


def _watch_output(module: nn.Module, site: _Site) -> None:
    module.register_forward_hook(lambda _, __, output: _update(site, output))


def _watch_input(module: nn.Module, site: _Site) -> None:
    module.register_forward_pre_hook(lambda _, inputs: _update(site, inputs[0]))


def _update(site: _Site, activations: torch.Tensor) -> None:
    for statistic in site.values():
        statistic.update(activations)


def _collect(layers: list[_LayerStatistics], shape: Shape) -> dict[str, torch.Tensor]:
    tensors = {"block_influence": torch.tensor([layer.block_influence.result() for layer in layers]).double()}
    for name in AGGREGATIONS:
        norms = [site[name].result() for layer in layers for site in (layer.input_norm, layer.post_attention_norm)]
        tensors[f"hidden.{name}"] = torch.stack(norms).sum(dim=0)
        tensors[f"ffn.{name}"] = torch.stack([layer.ffn[name].result() for layer in layers])
        channels = torch.stack([layer.heads[name].result() for layer in layers]).unflatten(1, (shape.heads, -1))
        # An energy is a sum of squares already; norms of channels combine to the norm of the head.
        tensors[f"heads.{name}"] = channels.sum(dim=2) if name == "energy" else channels.norm(dim=2)
    return tensors
