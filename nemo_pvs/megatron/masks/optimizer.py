"""Hold masks in Megatron's optimizers: a pruned weight has zero gradient and moments, and stays zero.

The masks are applied to the fp32 weights and gradients that the optimizer updates: whole tensors, or with the
distributed optimizer a data parallel rank's range of each flattened tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_pvs.errors import UserError
from nemo_pvs.megatron.masks.rank_masks import PackedMask, RankMasks
from nemo_pvs.model.layout import Entry


@dataclass(frozen=True)
class MaskedShard:
    """The weights of one masked tensor that this rank updates."""

    name: str
    """Megatron name, with layers counted over all pipeline stages: ``decoder.layers.3.mlp.linear_fc1.weight``."""
    mask: PackedMask
    main: torch.Tensor
    """The fp32 weights that the optimizer updates."""
    model: torch.Tensor
    """The same weights in the model, in its dtype; ``main`` itself if the model is fp32."""


@dataclass(frozen=True)
class ShardCheck:
    """Result of a rank's check of its shards."""

    weights: int
    """Number of weights in masked matrices."""
    zeros: int
    """Number of these that are zero in the model, pruned or by chance."""
    broken: tuple[str, ...]
    """Names of tensors with a pruned weight that is not zero."""


class MaskedOptimizer:
    """Masks installed in the optimizers of a rank, until the process ends.

    Gradients are masked after their reduction and before their norm is clipped, so that pruned weights do not count in
    the norm. ``clip_before_mask`` masks them after clipping, as the code published with 2606.14150 does.
    """

    def __init__(
        self,
        optimizers: Iterable[MegatronOptimizer],
        model: torch.nn.Module,
        masks: RankMasks,
        *,
        clip_before_mask: bool = False,
    ) -> None:
        """Install masks; existing moments of pruned weights are set to zero.

        Args:
            optimizers: Megatron's optimizers, chained or not.
            model: The model chunks of this rank.
            masks: The masks of this tensor parallel rank.
            clip_before_mask: Clip the norm of the dense gradient, before it is masked.

        Raises:
            UserError: an optimizer cannot hold masks.
        """
        masked = _masked_parameters(model, masks)
        self.shards: list[MaskedShard] = []
        for optimizer in unchained(optimizers):
            refuse_unfit(optimizer, masked)
            shards = list(_shards(optimizer, masked, masks))
            self.shards += shards
            _install(optimizer, shards, clip_before_mask=clip_before_mask)

    def check(self) -> ShardCheck:
        """Check for pruned weights that are not zero, in the optimizer and in the model."""
        return ShardCheck(
            weights=sum(shard.mask.weights for shard in self.shards),
            zeros=sum(shard.mask.weights - int(shard.model.count_nonzero()) for shard in self.shards),
            broken=tuple(
                shard.name for shard in self.shards if shard.mask.broken(shard.main) or shard.mask.broken(shard.model)
            ),
        )


def _masked_parameters(model: torch.nn.Module, masks: RankMasks) -> dict[torch.nn.Parameter, Entry]:
    """Return the parameters of this rank that have a mask, with their entries of the weight table."""
    masked = {}
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            for name, parameter in layer.named_parameters():
                # Megatron counts layers from 1 over all pipeline stages.
                entry = masks.entries.get((layer.layer_number - 1, name))
                if entry is not None:
                    masked[parameter] = entry
    return masked


def unchained(optimizers: Iterable[MegatronOptimizer]) -> Iterator[MegatronOptimizer]:
    """Yield the actual optimizers, without chains and stubs."""
    for optimizer in optimizers:
        if isinstance(optimizer, ChainedOptimizer):
            yield from unchained(optimizer.chained_optimizers)
        elif not getattr(optimizer, "is_stub_optimizer", False):
            yield optimizer


def refuse_unfit(
    optimizer: MegatronOptimizer,
    masked: Mapping[torch.nn.Parameter, Any],
    *,
    refusal: str = "Masks cannot be held",
) -> None:
    """Raise UserError if an optimizer does not expose its fp32 weights and gradients.

    Args:
        optimizer: One of Megatron's optimizers, not a chain.
        masked: The parameters that are to be masked, as keys.
        refusal: Start of the message; the reason follows.

    Raises:
        UserError: the optimizer hides its weights or gradients, or is of an unknown class.
    """
    reasons = {
        "the precision-aware optimizer keeps the weights inside its kernel; set use_precision_aware_optimizer=False": (
            optimizer.config.use_precision_aware_optimizer
        ),
        "CPU offload keeps other copies of the weights; set optimizer_cpu_offload=False": (
            optimizer.config.optimizer_cpu_offload
        ),
        "Megatron-FSDP shards weights in its own way; use the distributed optimizer": (
            getattr(getattr(optimizer, "ddp_config", None), "use_megatron_fsdp", False)
        ),
        "FP8 parameters are quantised inside Transformer Engine; keep them in bf16 and use FP8 only in matmuls": any(
            is_float8tensor(parameter) for parameter in masked
        ),
        f"{type(optimizer).__name__} is not supported; use Megatron's plain or distributed optimizer": not (
            isinstance(optimizer, DistributedOptimizer | Float16OptimizerWithFloat16Params | FP32Optimizer)
        ),
    }
    for reason, unfit in reasons.items():
        if unfit:
            raise UserError(f"{refusal}: {reason}.")


def _shards(
    optimizer: MegatronOptimizer, masked: Mapping[torch.nn.Parameter, Entry], masks: RankMasks
) -> Iterator[MaskedShard]:
    for parameter, main, start in owned(optimizer):
        if parameter in masked:
            entry = masked[parameter]
            local_range = slice(start, start + main.numel())
            yield MaskedShard(
                name=f"decoder.layers.{entry.layer}.{entry.megatron}",
                mask=PackedMask(masks.read(entry).flatten()[local_range], main.device),
                main=main,
                model=parameter.detach().view(-1)[local_range],
            )


def owned(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int]]:
    """Yield (parameter, fp32 tensor that this rank updates, its offset in the flattened parameter)."""
    if isinstance(optimizer, FP32Optimizer):
        yield from ((parameter, parameter, 0) for parameter in optimizer.get_parameters())
    elif isinstance(optimizer, DistributedOptimizer):
        half = _pairs(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups)
        full = _pairs(optimizer.model_fp32_groups, optimizer.shard_fp32_groups)
        for parameter, main in (*half, *full):
            yield parameter, main, optimizer._get_model_param_range_map(parameter)["param"].start
    else:
        half = _pairs(optimizer.float16_groups, optimizer.fp32_from_float16_groups)
        full = _pairs(optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups)
        yield from ((parameter, main, 0) for parameter, main in (*half, *full))


def _pairs(parameters: list[list[Any]], mains: list[list[Any]]) -> Iterator[tuple[Any, Any]]:
    for groups in zip(parameters, mains, strict=True):
        yield from zip(*groups, strict=True)


def _install(optimizer: MegatronOptimizer, shards: list[MaskedShard], *, clip_before_mask: bool) -> None:
    """Make an optimizer mask gradients and weights in every step, and zero the moments of pruned weights."""
    inner = optimizer.optimizer
    for shard in shards:
        for moment in inner.state.get(shard.main, {}).values():
            if isinstance(moment, torch.Tensor) and moment.numel() == shard.mask.weights:
                shard.mask.zero_pruned(moment)

    def mask_gradients(*_: Any) -> None:
        for shard in shards:
            if shard.main.grad is not None:
                shard.mask.zero_pruned(shard.main.grad)

    def mask_weights(*_: Any) -> None:
        for shard in shards:
            shard.mask.zero_pruned(shard.main)

    if clip_before_mask:
        inner.register_step_pre_hook(mask_gradients)
    else:
        prepare = optimizer.prepare_grads

        def prepare_and_mask() -> bool:
            overflow = prepare()
            mask_gradients()
            return overflow

        optimizer.prepare_grads = prepare_and_mask
    # Without gradient and moments the update is already zero; this hook covers anything else an optimizer may do.
    inner.register_step_post_hook(mask_weights)
