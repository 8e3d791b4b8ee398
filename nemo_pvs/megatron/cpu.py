"""Megatron on a CPU: temporarily redirect the few names of torch, Megatron and NeMo that assume CUDA.

Importing this module changes nothing. The launcher enters `megatron_on_cpu` on a machine without CUDA, and commands
enter it for ``--device cpu``; leaving it restores every name. A comment gives the reason for each redirection. Most
replace ``torch.cuda`` functions that Megatron calls unconditionally; only the modules that hard-code
``device="cuda"`` get a stand-in for ``torch``.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from nemo_pvs.system.processes import die_with_parent

_HOST = torch.device("cpu")
_INHERITED = object()

# Modules that hard-code device="cuda" or .to("cuda") in code that training on a CPU reaches.
_MODULES_WITH_LITERAL_CUDA = (
    "megatron.core.pipeline_parallel.schedules",  # the token count of a step
    "megatron.core.optimizer.clip_grads",  # the gradient norm
    "megatron.core.optimizer.optimizer",  # the overflow flag and the loss scale
    "megatron.core.utils",  # the norm of a list of tensors
    "nemo.lightning.pytorch.strategies.megatron_strategy",  # logged scalars, pinned and moved
    "nemo.lightning.pytorch.plugins.data_sampler",  # logged scalars, pinned and moved
)


@contextmanager
def megatron_on_cpu(*, although_there_is_a_gpu: bool = False) -> Iterator[None]:
    """Let NeMo and Megatron train on the CPU inside the block; outside it nothing changes.

    Args:
        although_there_is_a_gpu: The user has asked for the CPU (``--device cpu``); GPUs are hidden inside the block.

    Raises:
        RuntimeError: a CUDA device is present, so redirecting would silently train on the wrong device.
    """
    if torch.cuda.is_available() and not although_there_is_a_gpu:
        raise RuntimeError("megatron_on_cpu is for machines without CUDA; this one has a CUDA device.")
    originals: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, replacement in _redirections():
            originals.append((owner, name, vars(owner).get(name, _INHERITED)))
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in reversed(originals):
            if original is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _redirections() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, attribute, replacement) for every redirected name."""
    yield from ((torch.cuda, name, replacement) for name, replacement in _cuda_names().items())

    # Megatron and NeMo move modules and batches with .cuda(); here they are already on the right device.
    yield torch.Tensor, "cuda", lambda self, *args, **kwargs: self
    yield torch.nn.Module, "cuda", lambda self, *args, **kwargs: self
    # Mixed-precision optimizers distinguish half from full precision by the legacy type string "torch.cuda.*Tensor".
    yield torch.Tensor, "type", _legacy_cuda_type(torch.Tensor.type)

    for module in _MODULES_WITH_LITERAL_CUDA:
        yield importlib.import_module(module), "torch", _TorchOnHost()

    # The tracker forks CUDA generators by name; here it forks the CPU generator, so dropout and random initialisation
    # draw the same per-rank streams as on a GPU.
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    yield random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()
    yield random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)
    # NeMo seeds the tracker only if there is a CUDA device.
    megatron_init = importlib.import_module("nemo.lightning.megatron_init")
    yield megatron_init, "_set_random_seed", _seed_tracker_too(megatron_init._set_random_seed)

    # The checkpoint writer spawns a helper process of 200 MB that imports the main module again and would never exit
    # if its rank were killed. Ours is forked, as the writer's own workers are, and dies with its rank.
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    yield writer, "_get_write_results_queue", _write_results_queue

    # NeMo asserts a live CUDA context before it moves loaded tensors to "their" device.
    yield importlib.import_module("nemo.lightning.io.pl"), "_fix_tensors_device", lambda checkpoint: checkpoint


@cache
def _writer_helper() -> SyncManager:
    helper = SyncManager(ctx=multiprocessing.get_context("fork"))
    helper.start(initializer=_become_helper)
    return helper


def _become_helper() -> None:
    die_with_parent()
    gc.disable()  # objects inherited from the rank are the rank's to clean up


@cache
def _write_results_queue() -> Any:
    """Return the queue of Megatron's checkpoint writer, one per process, held by a helper that dies with it."""
    return _writer_helper().Queue()


def _cuda_names() -> dict[str, Any]:
    """Return replacements for the torch.cuda names that Megatron uses without checking for CUDA."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return {
        "is_available": lambda: False,  # also where there is a GPU, so that nothing chooses its kernels
        "device_count": lambda: 0,
        "current_device": lambda: _HOST,  # passed as device= wherever a buffer is created
        "synchronize": nothing,
        "empty_cache": nothing,
        "set_device": nothing,
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda *args: _NoStream(),
        "default_stream": lambda *args: _NoStream(),
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }


class _NoStream:
    """A stream or event on a device with a single queue: everything it could wait for is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _TorchOnHost:
    """Stand-in for ``torch`` in a module that hard-codes the CUDA device; everything else is torch itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, data: Any, *, pin_memory: bool = False, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = torch.as_tensor(data, **kwargs).clone()
        return made.as_subclass(_StaysOnHost) if pin_memory else made

    def zeros(self, *size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, **kwargs)


class _StaysOnHost(torch.Tensor):
    """A scalar that NeMo pins and moves with ``.to("cuda")`` before logging; here that returns a plain tensor."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def _legacy_cuda_type(original: Any) -> Any:
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = original(self, *args, **kwargs)
        return kind if args or kwargs else kind.replace("torch.", "torch.cuda.", 1)

    return type_


def _seed_tracker_too(original: Any) -> Any:
    def set_random_seed(seed: int) -> None:
        from megatron.core.parallel_state import get_pipeline_model_parallel_rank
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        original(seed)
        model_parallel_cuda_manual_seed(seed + 100 * get_pipeline_model_parallel_rank())

    return set_random_seed
