"""Transformer Engine's own Python code on a machine without CUDA: only its compiled extension is replaced.

``make test-te`` sets NVTE_PROJECT_BUILDING, with which Transformer Engine loads no CUDA library. That is enough to
build its modules and to see their names, arguments and states; nothing can be computed with them.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import torch

_EXTENSION = "transformer_engine_torch"
_APEX = "fused_weight_gradient_mlp_cuda"
"""The module by which NeMo and Megatron recognise Apex, which NVIDIA's containers have as well."""
_ONLY_TO_IMPORT = ("onnxscript", "triton", "triton.language", "triton.language.core", "triton.language.standard")
"""Packages that PyTorch for CPUs comes without; Transformer Engine uses them in kernels and exports only."""


class _Symbol:
    """Any class, function, enumeration or constant of the extension: can be called, compared and subclassed."""

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def __getattr__(self, name: str) -> _Symbol:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Symbol(f"{self.name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> _Symbol:
        return _Symbol(f"{self.name}()")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Symbol) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __int__(self) -> int:
        return 0

    def __or__(self, other: Any) -> _Symbol:
        return self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _Module(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> _Symbol:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Symbol(name)


def install() -> None:
    """Make ``transformer_engine.pytorch`` importable, and imitate Apex; call it before Megatron is imported."""
    sys.modules[_APEX] = types.ModuleType(_APEX)
    importlib.import_module("torch._dynamo")  # or it would take the stand-in below for Triton
    sys.modules.update({name: _Module(name) for name in (_EXTENSION, *_ONLY_TO_IMPORT)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that its extension was not found
        common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    for name in _ONLY_TO_IMPORT:
        del sys.modules[name]
    importlib.import_module("transformer_engine.pytorch.cpp_extensions").get_cudnn_version = lambda: 91002


@contextmanager
def as_on_an_h100() -> Iterator[None]:
    """Answer what Transformer Engine and Megatron ask about the device while a model is built."""
    device = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30)
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_properties": device,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
    }
    with mock.patch.multiple(
        torch.cuda, **{name: lambda *_, answer=answer: answer for name, answer in answers.items()}
    ):
        yield
