"""NeMo's own importer and exporter of Llama, made to run on a CPU: what our conversion is compared with.

They need a CUDA device, Transformer Engine and its kernels. ``megatron_on_cpu`` stands in for the first; here the
kernels are switched off, and the norms, which Transformer Engine fuses into the matrices behind them, get the names
that they have without it. Everything else is NeMo's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def import_with_nemo(source: Path, target: Path) -> None:
    """Convert a Hugging Face folder with ``HFLlamaImporter``."""
    from nemo.collections.llm.gpt.model import llama

    from nemo_pvs.megatron.cpu import megatron_on_cpu

    class Importer(llama.HFLlamaImporter):
        @property
        def config(self) -> Any:
            return _without_kernels(super().config)

        def convert_state(self, source: Any, target: Any) -> Any:
            target.to(source.dtype)  # without Transformer Engine norms are fp32
            with _renamed_norms(llama.io):
                return super().convert_state(source, target)

    with megatron_on_cpu(), _no_fused_rope():
        Importer(str(source)).apply(target)


def export_with_nemo(source: Path, target: Path) -> None:
    """Convert a NeMo checkpoint with ``HFLlamaExporter``, the loader of ``llm.export_ckpt`` included."""
    from nemo.collections.llm.gpt.model import llama
    from nemo.lightning.io import api

    from nemo_pvs.megatron.cpu import megatron_on_cpu

    load = api.load_context

    def load_without_kernels(*arguments: Any, **settings: Any) -> Any:
        loaded = load(*arguments, **settings)
        _without_kernels(getattr(loaded, "config", loaded))
        return loaded

    class Exporter(llama.HFLlamaExporter):
        def convert_state(self, source: Any, target: Any, source_config: Any = None) -> Any:
            source.to(target.dtype)
            with _renamed_norms(llama.io):
                return super().convert_state(source, target, source_config)

    with megatron_on_cpu(), _no_fused_rope():
        api.load_context = load_without_kernels
        try:
            Exporter(str(source)).apply(target)
        finally:
            api.load_context = load


def _without_kernels(config: Any) -> Any:
    from nemo_pvs.megatron.attention import FUSED_KERNELS, sdpa_layer_spec

    for kernel in FUSED_KERNELS:
        setattr(config, kernel, False)
    config.transformer_layer_spec = sdpa_layer_spec
    config.use_cpu_initialization = True
    config.perform_initialization = False
    return config


@contextmanager
def _no_fused_rope() -> Iterator[None]:
    """Let NeMo's config be built without the fused kernel, which is not called."""
    from megatron.core.models.common.embeddings import rope_utils

    fused = rope_utils.fused_apply_rotary_pos_emb
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.apply_rotary_pos_emb
    try:
        yield
    finally:
        rope_utils.fused_apply_rotary_pos_emb = fused


@contextmanager
def _renamed_norms(io: Any) -> Iterator[None]:
    apply: Callable[..., Any] = io.apply_transforms

    def apply_renamed(source: Any, target: Any, mapping: dict[str, str], **settings: Any) -> Any:
        renamed = {_rename(one): _rename(other) for one, other in mapping.items()}
        return apply(source, target, mapping=renamed, **settings)

    io.apply_transforms = apply_renamed
    try:
        yield
    finally:
        io.apply_transforms = apply


def _rename(key: str) -> str:
    prefix, star, module = key.rpartition("layers.*.")
    return prefix + star + _NORMS.get(module, module)
