"""Samples of the inputs of a Megatron model's linear layers while it trains, and Hessians computed from them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed

from nemo_pvs.pruning.sparse.sparsegpt import Hessian

ROW_PARALLEL = ("self_attention.linear_proj", "mlp.linear_fc2")
"""Layers whose inputs on a tensor rank are some of the channels, for all tokens."""
COLUMN_PARALLEL = ("self_attention.linear_qkv", "mlp.linear_fc1", "output_layer")
"""Layers whose inputs on a tensor rank are all channels, for all tokens or, with sequence parallelism, for some."""

Site = tuple[int | None, str]
"""Decoder layer, counted from 0 over all pipeline stages (None for the output head), and name of the linear layer."""


class InputSamples:
    """Inputs of every linear layer of a rank, at evenly spaced positions of every sequence.

    The positions depend only on the step's tokens, so that every layout samples the same ones (with context
    parallelism only if the stride divides the tokens of a rank's chunks).
    """

    def __init__(self, modules: dict[Site, torch.nn.Module], stride: int, *, sequence_parallel: bool) -> None:
        """Install hooks on the modules; nothing is kept until ``active`` is set.

        Args:
            modules: Linear layers of this rank.
            stride: Distance between the positions of a sequence that are kept.
            sequence_parallel: Whether each tensor rank has only a part of the tokens at column parallel layers.
        """
        self.active = False
        self._stride = stride
        self._sequence_parallel = sequence_parallel
        self._kept: dict[Site, list[torch.Tensor]] = {site: [] for site in modules}
        for site, module in modules.items():
            module.register_forward_pre_hook(self._hook(site))

    def _hook(self, site: Site) -> Any:
        def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.active and module.training:
                states = inputs[0].detach()
                first = 0
                if self._sequence_parallel and site[1] in COLUMN_PARALLEL:
                    first = len(states) * parallel_state.get_tensor_model_parallel_rank()
                sampled = states[-first % self._stride :: self._stride].flatten(0, 1)
                # With one sequence flattening does not copy, and a view would keep the whole input in memory.
                self._kept[site].append(sampled.clone())

        return keep

    def clear(self) -> None:
        """Discard the samples of a step."""
        for kept in self._kept.values():
            kept.clear()

    def hessian(self, site: Site) -> torch.Tensor:
        """Return the sum of ``x x^T`` over the sampled tokens of all ranks, fp32 [inputs, inputs].

        This is a collective over the ranks that have the layer.
        """
        states = torch.cat(self._kept[site])
        group = parallel_state.get_tensor_model_parallel_group()
        rows = site[1] in ROW_PARALLEL
        if rows and group.size() > 1:
            parts = [torch.empty_like(states) for _ in range(group.size())]
            distributed.all_gather(parts, states, group=group)
            states = torch.cat(parts, dim=-1)
        statistic = Hessian(states.shape[-1])
        statistic.update(states)
        total = statistic.result()
        distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if not rows and self._sequence_parallel:
            distributed.all_reduce(total, group=group)
        return total
