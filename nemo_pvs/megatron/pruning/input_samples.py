"""Samples of what the linear layers of a Megatron model read while it trains, and the Hessians made of them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import distributed

from nemo_pvs.pruning.sparse.sparsegpt import Hessian

ROW_PARALLEL = ("self_attention.linear_proj", "mlp.linear_fc2")
"""Layers of which a tensor rank reads some channels of all tokens."""
COLUMN_PARALLEL = ("self_attention.linear_qkv", "mlp.linear_fc1", "output_layer")
"""Layers of which a tensor rank reads all channels, of all tokens or, with sequence parallelism, of some."""

Site = tuple[int | None, str]
"""Decoder layer, from 0 over all stages, and the name of the linear layer in it; None for the output head."""


class InputSamples:
    """Inputs of every linear layer of a rank, at evenly spread positions of every sequence.

    The positions depend on the step's tokens alone, so that every layout samples the same ones.
    """

    def __init__(self, modules: dict[Site, torch.nn.Module], stride: int, *, sequence_parallel: bool) -> None:
        """Watch modules from now on; nothing is kept until ``active`` is set.

        Args:
            modules: Linear layers of this rank.
            stride: Every how many positions of a sequence one is kept.
            sequence_parallel: Whether tensor ranks share the tokens out between their column parallel layers.
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
                before = 0
                if self._sequence_parallel and site[1] in COLUMN_PARALLEL:
                    before = len(states) * parallel_state.get_tensor_model_parallel_rank()
                self._kept[site].append(states[-before % self._stride :: self._stride].flatten(0, 1))

        return keep

    def clear(self) -> None:
        """Forget the samples of a step."""
        for kept in self._kept.values():
            kept.clear()

    def hessian(self, site: Site) -> torch.Tensor:
        """Return the sum of ``x x^T`` over the sampled tokens of all ranks, fp32 [inputs, inputs].

        Every rank that has the layer calls this at the same time.
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
