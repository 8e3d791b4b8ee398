"""Megatron-Bridge and its Megatron-Core on a machine without CUDA, Transformer Engine and Triton.

Bridge imports both libraries, but a model of Megatron's own layers needs neither, nor a GPU. ``install`` is for a
process in which nothing else runs: it redirects names for good.
"""

from __future__ import annotations

import importlib
import sys
import types
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from typing import Any

import torch

_ONLY_TO_IMPORT = (
    "transformer_engine",
    "transformer_engine.pytorch",
    "transformer_engine.pytorch.ops",
    "triton",
    "triton.language",
    "megatron.energon",
)
_LAYERS = ("Linear", "LayerNormLinear", "GroupedLinear", "LayerNormMLP", "LayerNorm", "RMSNorm", "TransformerLayer")
_BEFORE = (
    "torch._dynamo",  # it would take the stand-in for Triton
    "transformers.modeling_utils",
    # Megatron-Core chooses its own layers if there is no Transformer Engine when these are imported.
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.dist_checkpointing",
)
_BRIDGE = (
    "megatron.bridge",
    "megatron.bridge.training.model_load_save",
    "megatron.bridge.training.checkpointing",
    "megatron.bridge.training.config",
    "megatron.bridge.training.gpt_step",
    "megatron.bridge.training.pretrain",
)
_FUSIONS = (
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


class _Anything:
    """Any class, function or constant of a library that is only imported."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_decorator = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if is_decorator else _Anything()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)

    def __getitem__(self, _: Any) -> _Anything:
        return _Anything()

    def __or__(self, _: Any) -> _Anything:
        return self

    __ror__ = __or__


class _Module(types.ModuleType):
    __version__ = "2.10.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def install() -> None:
    """Import Bridge, and have it build models of Megatron-Core's own layers on the CPU."""
    for name in _BEFORE:
        importlib.import_module(name)
    modules = {name: _Module(name) for name in _ONLY_TO_IMPORT}
    for name in _LAYERS:
        setattr(modules["transformer_engine.pytorch"], name, type(name, (torch.nn.Module,), {}))
    sys.modules.update(modules)
    for name in _BRIDGE:
        importlib.import_module(name)
    for name in modules:
        del sys.modules[name]
    _redirect_to_cpu()
    _use_own_layers()


def _use_own_layers() -> None:
    """Replace the layers of Transformer Engine in Bridge's defaults, and switch off kernels that need a GPU."""
    from megatron.bridge.models import gpt_provider
    from megatron.bridge.models.llama_nemotron import llama_nemotron_provider
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    gpt_provider.transformer_engine_layer_spec = gpt_provider.local_layer_spec

    def heterogeneous(config: Any) -> Any:
        return get_gpt_heterogeneous_layer_spec(config, use_te=False)

    llama_nemotron_provider.LlamaNemotronHeterogeneousProvider.transformer_layer_spec = heterogeneous
    initialise = llama_nemotron_provider.LlamaNemotronHeterogeneousProvider.__init__
    defaults = list(initialise.__defaults__ or ())
    initialise.__defaults__ = tuple(
        heterogeneous if value is llama_nemotron_provider.heterogeneous_layer_spec else value for value in defaults
    )
    original = TransformerConfig.__post_init__

    def without_fusions(self: Any) -> None:
        for name in _FUSIONS:
            setattr(self, name, False)
        original(self)

    TransformerConfig.__post_init__ = without_fusions


class _NoStream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _redirect_to_cpu() -> None:
    host = torch.device("cpu")

    def on_host(device: Any) -> Any:
        return host if isinstance(device, (str, torch.device)) and str(device).startswith("cuda") else device

    def moved(original: Any) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = on_host(kwargs["device"])
            return original(*map(on_host, args), **kwargs)

        return function

    nothing = {name: lambda *_: None for name in ("synchronize", "set_device", "empty_cache", "manual_seed")}
    cuda: dict[str, Any] = {
        **nothing,
        "current_device": lambda: host,
        "device_count": lambda: 1,
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda _: nullcontext(),
        "current_stream": _NoStream,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "_lazy_call": lambda _: None,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.to = moved(torch.Tensor.to)  # type: ignore[method-assign]
    for name in ("tensor", "empty", "zeros", "ones", "arange", "empty_like"):
        setattr(torch, name, moved(getattr(torch, name)))
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, name=None: nullcontext()
